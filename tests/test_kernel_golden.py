"""The worked examples of the reference page on token reduction, against the kernels."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from effopt.kernel import kernel

X = torch.tensor([[2.0, 0], [4, 2], [0, 6], [8, 8], [1, 1], [-3, 5]])
KEYS = torch.tensor([[1.0, 0], [4, 3], [7, 24], [3, 4], [-1, 0], [0, -1]])
FORMS = ("op", "lowering")


def merged(
    form: str, keys: Tensor, x: Tensor, size: Tensor, r: int, prefix: int = 0
) -> tuple[Tensor, Tensor, list[set[int]]]:
    """Match and merge one sample: values, sizes, and which tokens each stands for."""
    match, merge, group = (
        getattr(kernel(name), form) for name in ("match_tokens", "merge_tokens", "group_tokens")
    )
    kept, source, target = match(keys[None], size[None], r, len(x) - r, prefix, 0, False)
    y, summed = merge(x[None], size[None], kept, source, target)
    home = group(x[None], kept, source, target)[0].tolist()
    groups = [{place for place, spot in enumerate(home) if spot == at} for at in range(len(x) - r)]
    return y[0], summed[0], groups


def near(got: Tensor, want: list[object]) -> None:
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-6)


Merge = Callable[..., tuple[Tensor, Tensor, list[set[int]]]]
"""What merges a sample as `merged` does: of keys, values, sizes, r and a prefix."""


def two_of_six_then_one_of_four(merge: Merge) -> None:
    y, size, groups = merge(KEYS, X, torch.ones(6), 2)
    near(y, [[1.0, 1], [3, 1], [4, 7], [-3, 5]])
    near(size, [1.0, 2, 2, 1])
    assert groups == [{4}, {0, 1}, {2, 3}, {5}]

    keys = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, -1]])
    z, size, groups = merge(keys, y, size, 1)
    near(z, [[4.0, 7], [7 / 3, 1], [-3, 5]])
    near(size, [2.0, 3, 1])
    assert groups == [{2}, {0, 1}, {3}]
    near((z * size[:, None]).sum(0) / size.sum(), [2.0, 11 / 3])


def beside_a_class_token(merge: Merge) -> None:
    y, size, groups = merge(KEYS, X, torch.ones(6), 2, prefix=1)
    near(y, [[2.0, 0], [4, 2], [4, 7], [-1, 3]])
    near(size, [1.0, 1, 2, 2])
    assert groups == [{0}, {1}, {2, 3}, {4, 5}]


def two_sources_of_one_target(merge: Merge) -> None:
    keys = torch.tensor([[1.0, 0], [1, 0], [4, 3], [0, 1], [-1, 0], [0, -1]])
    y, size, groups = merge(keys, X, torch.ones(6), 2)
    near(y, [[1.0, 1], [2, 8 / 3], [8, 8], [-3, 5]])
    near(size, [1.0, 3, 1, 1])
    assert groups == [{4}, {0, 1, 2}, {3}, {5}]


EXAMPLES = (two_of_six_then_one_of_four, beside_a_class_token, two_sources_of_one_target)
"""Worked examples of merging, for every form that it has."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("example", EXAMPLES)
def test_merging(example: Callable[[Merge], None], form: str) -> None:
    example(partial(merged, form))


def test_equal_keys_merge_at_the_lowest_places() -> None:
    # The standard form leaves ties to TopK, which takes the lower index in ONNX, not in torch.
    _, _, groups = merged("op", torch.ones(8, 2), torch.ones(8, 2), torch.ones(8), 2)
    assert groups == [{4}, {6}, {0, 1, 2}, {3}, {5}, {7}]


@pytest.mark.parametrize("form", FORMS)
def test_scale_of_keys_does_not_matter_and_zero_keys_are_no_nan(form: str) -> None:
    wide = merged(form, KEYS * torch.tensor([[1e3, 1e3]]), X, torch.ones(6), 2)
    assert wide[2] == merged(form, KEYS, X, torch.ones(6), 2)[2]
    y, _, _ = merged(form, torch.zeros(6, 2), X, torch.ones(6), 3)
    assert y.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_proportional_attention_counts_a_key_as_often_as_it_has_originals(form: str) -> None:
    row = getattr(kernel("attention_row"), form)
    for logits, size, want in (
        ((0.0, 0.0), (1.0, 3.0), [0.25, 0.75]),
        ((1.0, 2.0), (2.0, 1.0), [0.423883, 0.576117]),
    ):
        q, k = torch.ones(1, 1, 2, 1), torch.tensor(logits).reshape(1, 1, 2, 1)
        bias = torch.tensor(size).log().reshape(1, 1, 1, 2)
        near(row(q, k, bias, torch.ones(1, 2), [0], 1.0, False)[0], want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("normalize", "fused"), [(False, [0.2, 0.2]), (True, [4 / 3, 4 / 3])], ids=["sum", "mean"]
)
def test_pruning_with_a_fused_token(form: str, normalize: bool, fused: list[float]) -> None:
    score = torch.tensor([[0.2, 0.10, 0.40, 0.05, 0.25]])
    x = torch.tensor([[[9.0, 9], [1, 0], [0, 2], [2, 4], [3, 3]]])
    kept = getattr(kernel("select_tokens"), form)(score, 3, 1, 0)
    assert kept.tolist() == [[0, 2, 4]]
    near(getattr(kernel("gather_tokens"), form)(x, kept, 1)[0], [[9.0, 9], [0, 2], [3, 3]])
    near(getattr(kernel("fuse_tokens"), form)(x, score, kept, normalize)[0], [fused])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(6, 6), (4, 6, 6), (2, 1, 6, 6), (6,), (1, 6), (2, 4, 1, 6)])
@pytest.mark.parametrize("boolean", [False, True], ids=["added", "boolean"])
def test_a_row_of_attention_is_that_of_the_whole_map(
    form: str, shape: tuple[int, ...], boolean: bool
) -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    bias = torch.rand(shape) > 0.3 if boolean else torch.randn(shape)
    if boolean:
        bias[..., 0] = True
    logits = q @ k.transpose(2, 3) * 0.3
    whole = (logits.masked_fill(~bias, -torch.inf) if boolean else logits + bias).softmax(-1)
    for rows in ([0], [0, 1], [-1]):
        want = whole[:, :, rows].mean(dim=(1, 2))
        got = getattr(kernel("attention_row"), form)(
            q, k, bias, torch.ones(k.shape[0], k.shape[2]), rows, 0.3, False
        )
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_grouped_queries_share_their_key(form: str) -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    want = (q @ k.repeat_interleave(2, 1).transpose(2, 3)).softmax(-1)[:, :, 0].mean(1)
    got = getattr(kernel("attention_row"), form)(
        q, k, None, torch.ones(k.shape[0], k.shape[2]), [0], 1.0, False
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_over_all_queries_leaves_padding_out_and_hides_what_comes_later(form: str) -> None:
    q, k = torch.zeros(1, 1, 3, 1), torch.ones(1, 1, 3, 1)
    row = getattr(kernel("attention_row"), form)
    near(row(q, k, None, torch.ones(1, 3), [], 1.0, True)[0], [11 / 18, 5 / 18, 2 / 18])
    near(row(q, k, None, torch.tensor([[1.0, 1, 0]]), [], 1.0, True)[0], [3 / 4, 1 / 4, 0])
    near(row(q, k, None, torch.tensor([[1.0, 3, 0]]), [], 1.0, True)[0], [5 / 8, 3 / 8, 0])
