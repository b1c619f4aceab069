"""Axes of whole graphs: identities, never sizes; conflicts are explained."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from effopt.axes import find_axes
from effopt.capture import capture
from tests.traced import Wrapped, traced


def _self_attention(x: Tensor) -> Tensor:
    h = x.unflatten(2, (5, 5)).transpose(1, 2)
    y = scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(2)
    return x + y


def test_equal_sizes_are_not_equal_axes() -> None:
    """Five tokens, five heads, heads five wide, batch five, and an equal second sequence."""
    program, axes = traced(
        lambda x, y: (_self_attention(x), _self_attention(y)), (5, 5, 25), (5, 5, 25)
    )
    assert not axes.unknown
    for node in program.inputs():
        batch, tokens, channels = axes.of(node)
        heads, width = channels
        assert len({*batch, *tokens, heads, width}) == 4
    first, second = (axes.of(node)[1] for node in program.inputs())
    assert first != second, "two sequences of one length are two axes"


def test_cross_attention_keeps_two_axes_of_one_size() -> None:
    def cross(x: Tensor, y: Tensor) -> Tensor:
        q, k = x.unsqueeze(1), y.unsqueeze(1)
        return x + scaled_dot_product_attention(q, k, k).squeeze(1)

    program, axes = traced(cross, (3, 6, 8), (3, 6, 8))
    left, right = (axes.of(node) for node in program.inputs())
    assert left[0] == right[0]
    assert left[1] != right[1]
    assert left[2] == right[2]


def test_torch_cross_attention_is_understood() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    _, axes = traced(lambda x, y: layer(x, y, y)[0], (3, 6, 8), (3, 5, 8))
    assert not axes.unknown, list(axes.unknown.values())


def test_an_operator_without_a_rule_is_named() -> None:
    program, axes = traced(lambda x: x.logcumsumexp(1) + 1, (4, 5))
    assert {node.name: why for node, why in axes.unknown.items()} == {
        "logcumsumexp": "no axis rule for aten.logcumsumexp.default"
    }
    node = next(iter(axes.unknown))
    assert all(dim not in axes.of(program.inputs()[0]) for dim in axes.of(node))


def test_a_conflict_is_explained_at_the_operator_where_it_shows() -> None:
    program, axes = traced(lambda x: torch.relu(x).view(-1, 2, 6) + 1, (4, 3, 4))
    assert {node.name: why for node, why in axes.unknown.items()} == {
        "view": "view: x.1 of 3 is cut in the middle"
    }
    found = axes.of(program.inputs()[0])
    assert not set(found) & set(axes.of(next(iter(axes.unknown)))), "nothing is guessed"


def test_an_arange_becomes_the_axis_that_it_first_meets() -> None:
    program, axes = traced(lambda x: x + torch.arange(5.0), (4, 5))
    counted = next(node for node in program.nodes() if "arange" in node.name)
    assert axes.of(counted)[0] == axes.of(program.inputs()[0])[1]


def test_what_the_data_decides_is_unknown_with_a_reason() -> None:
    _, axes = traced(lambda x: x + torch.rand_like(x), (4, 5))
    assert list(axes.unknown.values()) == ["it is random"]


def test_windows_of_a_symbolic_batch_are_understood_there_and_back() -> None:
    """(B, 8, 6, C) -> (B * 4 * 3, 2 * 2, C) -> back: all with B a symbol."""

    def windows(x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        cut = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        flat = torch.relu(cut.reshape(-1, 4, c))
        back = flat.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        return back.reshape(b, h, w, c)

    program = capture(Wrapped(windows), (torch.randn(3, 8, 6, 5),), dynamic=("batch",))
    axes = program.get(find_axes)
    assert not axes.unknown, axes.unknown
    node = program.output().args[0][0]  # type: ignore[index]
    assert axes.of(node) == axes.of(program.inputs()[0])
