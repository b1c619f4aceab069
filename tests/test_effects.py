"""Effects: what every family of operators does along tokens; a reason wherever it is ORDER."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from effopt.axes import find_axes, leaves
from effopt.axis_table import FAMILIES
from effopt.capture import capture
from effopt.effects import EFFECTS, effect
from effopt.program import shape
from effopt.rules_table import rules
from effopt.tokens import Tokens

Function = Callable[..., Any]
GRID = torch.randn(7, 8, 1)
WIDE = torch.randn(7, 8, 3)
TABLE = torch.randn(10, 7)
IDS = torch.tensor([3, 1, 2])


class Wrapped(nn.Module):
    """A function as a model."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y)


def last_effect(function: Function, dim: int = 1) -> str:
    """Return the effect of the output's operator along dimension `dim` of x [3, 6, 8].

    y [3, 6, 8] holds small whole numbers; its tokens are those of x where they meet.
    """
    y = torch.arange(144).reshape(3, 6, 8) % 5
    program = capture(Wrapped(function), (torch.randn(3, 6, 8), y), dynamic=("batch",))
    axes = program.get(find_axes)
    x = program.inputs()[0]
    batch, tokens = (leaves(axes.of(x)[place]) for place in (0, dim))
    found = (effect(node, Tokens(tokens, shape(x)[dim], axes, batch)) for node in program.nodes())
    seen = [one for one in found if one is not None and one.kind.value != "emit"]
    return ": ".join(word for word in (seen[-1].kind.value, seen[-1].reason) if word)


MAPS: dict[str, Function] = {
    "unary": lambda x, y: x.acos(),
    "binary": lambda x, y: torch.pow(2.0, x),
    "other": lambda x, y: torch.max(x, x.sign()),
    "floor-divide": lambda x, y: (x + y) // 2,
    "clip": lambda x, y: x.clip(0, 1),
    "copy": lambda x, y: torch.nan_to_num(x),
    "batch-norm-by-channel": lambda x, y: F.batch_norm(
        x.transpose(1, 2), torch.zeros(8), torch.ones(8)
    ),
    "convolution-of-one-place": lambda x, y: F.conv1d(x.transpose(1, 2), GRID),
    "norm-over-channels": lambda x, y: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "variance": lambda x, y: x.var(-1),
    "log-sum": lambda x, y: x.logsumexp(-1),
    "gated-channels": lambda x, y: F.glu(x),
    "best-channels": lambda x, y: x.topk(2, -1).values,
    "sorted-channels": lambda x, y: x.sort(-1)[0],
    "picked-channels": lambda x, y: x[:, :, IDS],
    "selected-channels": lambda x, y: x.index_select(2, IDS),
    "gathered-channels": lambda x, y: (x + y).gather(2, y),
    "scattered-channels": lambda x, y: (x + y).scatter(2, y, x),
    "read-table": lambda x, y: TABLE[(y + x.long())],
    "padded-channels": lambda x, y: F.pad(x, (1, 2)),
    "repeated-channels": lambda x, y: x.repeat(1, 1, 3),
    "copied-channels": lambda x, y: x.repeat_interleave(2, dim=-1),
    "flipped-channels": lambda x, y: x.flip(-1),
    "rotated": lambda x, y: torch.view_as_complex(x.unflatten(2, (4, 2))),
    "einsum-of-heads": lambda x, y: torch.einsum("bnc,cd->bnd", x, TABLE[:8]),
    "einsum-of-pairs": lambda x, y: torch.einsum("bnc,bmc->bnm", x, x),
    "classes": lambda x, y: F.one_hot((x + y).long().clamp(0, 4), 5),
    "buckets": lambda x, y: torch.bucketize(x, torch.tensor([0.0, 1.0])),
    "distances": lambda x, y: torch.cdist(x, TABLE[:, :1].expand(10, 8)),
    "masked": lambda x, y: x.masked_fill(x > 0, 0.0),
    "pooled-channels": lambda x, y: F.adaptive_avg_pool1d(x, 1),
    "expanded-like": lambda x, y: x[:, :, :1].expand_as(x),
    "moved": lambda x, y: x.movedim(1, 0),
    "viewed-like": lambda x, y: x.reshape_as(x + 1),
    "vector": lambda x, y: x @ torch.ones(8),
    "fft-of-channels": lambda x, y: torch.fft.fft(x, dim=-1),
}


@pytest.mark.parametrize("name", MAPS)
def test_what_works_token_by_token_is_map(name: str) -> None:
    assert last_effect(MAPS[name]) == "map"


ORDERS: dict[str, tuple[Function, str]] = {
    "flip": (lambda x, y: x.flip(1), "the tokens are shifted"),
    "roll": (lambda x, y: x.roll(2, 1), "the tokens are shifted"),
    "sort": (lambda x, y: x.sort(1)[0], "the tokens are sorted, compared or transformed"),
    "topk": (lambda x, y: x.topk(2, 1)[0], "the tokens are sorted, compared or transformed"),
    "fft": (lambda x, y: torch.fft.fft(x, dim=1), "the tokens are sorted, compared or transformed"),
    "differences": (lambda x, y: x.diff(dim=1), "the tokens are sorted, compared or transformed"),
    "gated": (lambda x, y: F.glu(x, 1), "the tokens are halved"),
    "pad": (lambda x, y: F.pad(x, (0, 0, 0, 2)), "the tokens are padded"),
    "repeat": (lambda x, y: x.repeat(1, 2, 1), "the tokens are repeated"),
    "copies": (lambda x, y: x.repeat_interleave(2, 1), "the tokens are repeated"),
    "triangle": (lambda x, y: x.tril(), "it depends on the order of the tokens"),
    "product": (lambda x, y: x.cumprod(1), "it depends on the order of the tokens"),
    "batch-norm": (
        lambda x, y: F.batch_norm(x, torch.zeros(6), torch.ones(6)),
        "every token has weights of its own",
    ),
    "group-norm": (
        lambda x, y: F.group_norm(x.transpose(1, 2), 2),
        "a norm runs over the tokens",
    ),
    "wide-convolution": (
        lambda x, y: F.conv1d(x.transpose(1, 2), WIDE, padding=1),
        "a convolution or pooling runs over the tokens",
    ),
    "convolution-over-tokens-as-channels": (
        lambda x, y: F.conv1d(x, torch.ones(4, 6, 1)),
        "a convolution or pooling runs over the tokens",
    ),
    "pooling": (
        lambda x, y: F.adaptive_avg_pool1d(x.transpose(1, 2), 1),
        "a convolution or pooling runs over the tokens",
    ),
    "index": (lambda x, y: x[:, IDS], "tokens are picked by an index"),
    "select": (lambda x, y: x.index_select(1, IDS), "tokens are picked by an index"),
    "gather": (lambda x, y: x.gather(1, y), "tokens are gathered by an index"),
    "gather-elsewhere": (
        lambda x, y: x.gather(2, y[:, :2]),
        "tokens are gathered by an index of other places",
    ),
    "index-of-both": (
        lambda x, y: x[:, :, (x + y)[0, :, 0].long() * 0],
        "an index that counts the tokens is read from a value that does, too",
    ),
    "table-of-tokens": (lambda x, y: F.embedding(IDS, x[0]), "a table is read by token place"),
    "masked-scatter": (
        lambda x, y: x.masked_scatter(x > 0, y * 1.0),
        "tokens take their places by a mask",
    ),
    "variance": (
        lambda x, y: x.var(1),
        "aten.var.dim over the tokens has no weighted form",
    ),
    "einsum": (
        lambda x, y: torch.einsum("bnc,nm->bmc", x, TABLE[:6]),
        "an einsum mixes the tokens",
    ),
    "einsum-of-a-diagonal": (
        lambda x, y: torch.einsum("bnn->bn", x @ x.transpose(1, 2)),
        "it takes tokens out of a table of token pairs",
    ),
    "einsum-of-samples": (
        lambda x, y: torch.einsum("bnc,bnd->ncd", x, x),
        "an einsum mixes tokens of different samples, and each sample keeps others",
    ),
    "overwritten": (
        lambda x, y: x.slice_scatter(y[:, :2] * 1.0, 1, 0, 2),
        "some tokens are overwritten",
    ),
    "windows": (lambda x, y: x.unfold(1, 2, 2), "the tokens are cut into windows"),
    "samples-are-repeated": (
        lambda x, y: x.repeat(2, 1, 1),
        "tokens of different samples would be compared, and each sample keeps others",
    ),
    "samples-are-picked": (
        lambda x, y: x[IDS * 0],
        "tokens of different samples would be compared, and each sample keeps others",
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_what_needs_the_tokens_in_place_says_why(name: str) -> None:
    function, reason = ORDERS[name]
    assert last_effect(function) == f"order: {reason}"


def test_a_token_per_sample_is_picked_by_an_index() -> None:
    def at_end(x: Tensor, y: Tensor) -> Tensor:
        return x[torch.arange(x.shape[0]), y[:, 0, 0]]

    assert last_effect(at_end) == "order: tokens are picked by an index"


def test_a_product_over_samples_is_refused() -> None:
    """It mixed token i of each sample, and each sample keeps others: it was called map."""
    assert last_effect(lambda x, y: x.permute(1, 2, 0) @ x.transpose(0, 1)).startswith(
        "order: a product mixes tokens of different samples"
    )


@pytest.mark.parametrize(("dim", "want"), [(0, "map"), (1, "order")])
def test_the_size_of_another_dimension_is_harmless(dim: int, want: str) -> None:
    program = capture(
        Wrapped(lambda x, y: (x * y).new_ones(x.shape[0], x.shape[1])),
        (torch.randn(3, 6, 8), torch.ones(3, 6, 8).long()),
        dynamic=("batch", "length"),
    )
    axes = program.get(find_axes)
    x = program.inputs()[0]
    tokens = Tokens(leaves(axes.of(x)[1]), shape(x)[1], axes, leaves(axes.of(x)[0]))
    sizes = {
        node.args[1]: effect(node, tokens)
        for node in program.nodes()
        if node.target is torch.ops.aten.sym_size.int and isinstance(node.args[0], Node)
    }
    found = sizes.get(dim)
    assert found is not None
    assert found.kind.value == want


def test_every_family_has_an_effect() -> None:
    assert set(FAMILIES) - set(EFFECTS) == set()


def test_the_table_to_read_has_a_line_for_each_family() -> None:
    rows = rules()
    assert [row.family for row in rows if row.family] == list(FAMILIES)
    for row in rows:
        assert row.operators
        assert row.axes
        assert row.effect
    (flips,) = (row for row in rows if row.family == "roll")
    assert flips.operators == ("roll", "flip")
    assert flips.effect == "map, or order: the tokens are shifted"
