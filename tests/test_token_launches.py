"""match_merge and prune_tokens in every form: the worked examples, ties, padding, large inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effopt.backends.kernels import match_merge, prune_tokens
from effopt.kernel import Kernel, kernel
from effopt.plugin import Execute, Plugin, running
from tests.plugin_runs import in_onnxruntime, in_reference, on_host
from tests.test_kernel_golden import EXAMPLES, KEYS, Merge, X, near

few = settings(max_examples=20, deadline=None)


def launched(execute: Execute) -> Callable[[Kernel], Callable[..., Any]]:
    def form(found: Kernel) -> Callable[..., Any]:
        assert found.plugin is not None
        adapt = found.plugin.adapt

        def run(*args: Any) -> Any:
            with running(execute):
                return adapt(*args)

        return run

    return form


FORMS: dict[str, Callable[[Kernel], Callable[..., Any]]] = {
    "op": lambda found: found.op,
    "lowering": lambda found: found.lowering,
    "onnxruntime": launched(in_onnxruntime),
    "reference": launched(in_reference),
    "cuda on the host": launched(on_host),
}
EXACT = tuple(name for name in FORMS if name != "lowering")
"""The forms that fix ties: torch's TopK, which the standard form uses, does not."""


def merged(
    form: str, keys: Tensor, x: Tensor, size: Tensor, r: int, prefix: int = 0
) -> tuple[Tensor, Tensor, list[set[int]]]:
    """Merge one sample: values, sizes, and which tokens each stands for."""
    run = FORMS[form](match_merge.KERNEL)
    y, summed, *pairs = run(keys[None], x[None], size[None], r, len(x) - r, prefix, 0, False)
    home = FORMS[form](kernel("group_tokens"))(x[None], *pairs)[0].tolist()
    groups = [{place for place, spot in enumerate(home) if spot == at} for at in range(len(x) - r)]
    return y[0], summed[0], groups


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("example", EXAMPLES)
def test_merging_in_one_launch(example: Callable[[Merge], None], form: str) -> None:
    example(partial(merged, form))


@pytest.mark.parametrize("form", EXACT)
def test_equal_keys_merge_at_the_lowest_places(form: str) -> None:
    _, _, groups = merged(form, torch.ones(8, 2), torch.ones(8, 2), torch.ones(8), 2)
    assert groups == [{4}, {6}, {0, 1, 2}, {3}, {5}, {7}]


@pytest.mark.parametrize("form", FORMS)
def test_keys_of_zeros_are_no_nan(form: str) -> None:
    y, size, _ = merged(form, torch.zeros(6, 2), X, torch.ones(6), 3)
    assert y.isfinite().all()
    assert size.sum() == 6


@pytest.mark.parametrize("form", EXACT)
def test_padding_that_merges_with_padding_stays_padding(form: str) -> None:
    x, size = torch.arange(12.0).reshape(6, 2), torch.tensor([1.0, 0, 0, 0, 0, 0])
    y, summed, groups = merged(form, KEYS, x, size, 2)
    assert groups == [{0}, {1, 2, 4}, {3}, {5}]
    near(summed, [1.0, 0, 0, 0])
    near(y, [[0.0, 1], [14 / 3, 17 / 3], [6, 7], [10, 11]])


def exact_keys(b: int, n: int, draw: torch.Generator) -> Tensor:
    """Draw keys [b, n, 4] whose cosines are -1, 0 and 1 to the last bit: ties everywhere."""
    basis = torch.eye(4)[torch.randint(0, 4, (b, n), generator=draw)]
    powers, signs = (torch.randint(low, high, (b, n, 1), generator=draw) for low, high in BOUNDS)
    return basis * 2.0**powers * signs


BOUNDS = ((-2, 3), (-1, 2))


@st.composite
def tied(draw: st.DrawFn) -> tuple[Any, ...]:
    """Arguments of match_merge with tied keys, padding and protection."""
    b, n, c = draw(st.integers(1, 3)), draw(st.integers(4, 40)), draw(st.sampled_from([1, 3, 8]))
    prefix, suffix = draw(st.integers(0, 2)), draw(st.integers(0, 1))
    even = sum(place % 2 == 0 for place in range(prefix, n - suffix))
    r = draw(st.integers(1, max(1, min((n - prefix - suffix) // 2, even))))
    made = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    metric = exact_keys(b, n, made)
    size = torch.randint(0, 4, (b, n), generator=made).float()
    x = torch.randint(-4, 5, (b, n, c), generator=made).float()
    return metric, x, size, r, n - r, prefix, suffix, draw(st.booleans())


@few
@given(tied())
def test_ties_padding_and_protection_are_those_of_the_two_kernels(args: tuple[Any, ...]) -> None:
    want = match_merge.KERNEL.op(*args)
    for execute in (in_onnxruntime, on_host):
        got = launched(execute)(match_merge.KERNEL)(*args)
        for place in (2, 3, 4):
            assert torch.equal(want[place], got[place])
        for a, b in zip(want[:2], got[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)  # at most 4: sums of 40 roundings


@st.composite
def scored(draw: st.DrawFn) -> tuple[Any, ...]:
    """Arguments of prune_tokens with few different scores."""
    b, n, c = draw(st.integers(1, 3)), draw(st.integers(2, 40)), draw(st.sampled_from([1, 3, 8]))
    prefix = draw(st.integers(0, 1))
    suffix = draw(st.integers(0, 1)) if n > 2 else 0
    keep = draw(st.integers(max(1, prefix + suffix), n))
    made = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    score = torch.randint(0, 4, (b, n), generator=made).float()
    x = torch.randn(b, n, c, generator=made)
    return x, score, torch.rand(b, n, generator=made), keep, prefix, suffix


@few
@given(scored())
def test_pruning_fixes_ties_as_the_two_kernels_do(args: tuple[Any, ...]) -> None:
    want = prune_tokens.KERNEL.op(*args)
    for execute in (in_onnxruntime, on_host):
        got = launched(execute)(prune_tokens.KERNEL)(*args)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_pruning_the_worked_example(form: str) -> None:
    score = torch.tensor([[0.2, 0.10, 0.40, 0.05, 0.25]])
    x = torch.tensor([[[9.0, 9], [1, 0], [0, 2], [2, 4], [3, 3]]])
    y, along, kept = FORMS[form](prune_tokens.KERNEL)(x, score, score, 3, 1, 0)
    assert kept.tolist() == [[0, 2, 4]]
    near(y[0], [[9.0, 9], [0, 2], [3, 3]])
    near(along[0], [0.2, 0.4, 0.25])


@pytest.mark.parametrize(
    ("n", "d", "c", "r", "kind"),
    [
        (197, 64, 768, 8, torch.float32),
        (197, 64, 768, 8, torch.float16),
        (577, 16, 40, 60, torch.float32),
    ],
)
def test_sizes_of_real_models_on_the_host(
    n: int, d: int, c: int, r: int, kind: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(n)
    metric, x = (torch.randn(2, n, width, generator=draw).to(kind) for width in (d, c))
    args = (metric, x, torch.ones(2, n), r, n - r, 1, 0, False)
    want, got = match_merge.KERNEL.op(*args), launched(on_host)(match_merge.KERNEL)(*args)
    assert all(torch.equal(a, b) for a, b in zip(want[1:], got[1:], strict=True))
    # Sums of a few values up to 4 in another order; in float16 one rounding more.
    tolerance = 1e-6 if kind == torch.float32 else 2e-3
    torch.testing.assert_close(want[0], got[0], rtol=0, atol=tolerance)


def test_more_tokens_than_one_round_of_norms_takes() -> None:
    draw = torch.Generator().manual_seed(0)
    args = (exact_keys(2, 1030, draw), torch.randn(2, 1030, 6, generator=draw))
    want, got = (
        form(match_merge.KERNEL)(*args, torch.ones(2, 1030), 300, 730, 1, 0, False)
        for form in (FORMS["op"], launched(on_host))
    )
    assert all(torch.equal(a, b) for a, b in zip(want[1:], got[1:], strict=True))
    # Averages of up to some hundred tokens, of values up to 4 that are added in another order.
    torch.testing.assert_close(want[0], got[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("found", [match_merge, prune_tokens], ids=lambda m: m.PLUGIN.name)
def test_the_largest_number_of_tokens_fits_into_a_block(found: Any) -> None:
    """48 KB are what a block has without asking for more."""
    plugin: Plugin = found.PLUGIN
    known = {"B": 1, "N": found.TOKENS, "D": 64, "C": 64, **dict.fromkeys(plugin.attributes, 1)}
    assert plugin.launch(known | {"keep": found.TOKENS}).shared <= 48 << 10


def test_what_no_launch_is_made_for_is_lowered() -> None:
    def refuse(plugin: Plugin, inputs: Any, attributes: Any) -> Any:
        raise AssertionError(plugin.name)

    n = match_merge.TOKENS + 1
    many = (torch.randn(1, n, 2), torch.randn(1, n, 1), torch.ones(1, n), 3, n - 3, 0, 0, True)
    mixed = (torch.randn(1, 8, 2).half(), torch.randn(1, 8, 1), torch.ones(1, 8), 3, 5, 0, 0, True)
    for args in (many, mixed):
        want = match_merge.lowering(*args)
        got = launched(refuse)(match_merge.KERNEL)(*args)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
