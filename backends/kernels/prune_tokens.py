"""prune_tokens: select_tokens, and the gather_tokens of what it keeps, in one launch.

No pass puts it into a graph: `effopt.backends.fuse` does, for targets with plugins.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels import gather_tokens, select_tokens
from effopt.backends.kernels.common import Value, arg_dims, op, reduced
from effopt.backends.kernels.select_tokens import HIGH
from effopt.kernel import Kernel
from effopt.plugin import Plugin, Port, call
from effopt.program import value

Pruned = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("effopt::prune_tokens", mutates_args=())
def prune_tokens(
    x: Tensor, score: Tensor, along: Tensor, keep: int, prefix: int, suffix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the tokens of x [B, N, C] with the highest score [B, N]; along [B, N] goes with them.

    Returns the rows [B, keep, C], the numbers of along [B, keep], and kept of `select_tokens`,
    whose arguments the others are.
    """
    kept = select_tokens.KERNEL.op(score, keep, prefix, suffix)
    rows, numbers = (gather_tokens.KERNEL.op(values, kept, 1) for values in (x, along))
    return rows, numbers, kept


@prune_tokens.register_fake
def _(
    x: Tensor, score: Tensor, along: Tensor, keep: int, prefix: int, suffix: int
) -> tuple[Tensor, Tensor, Tensor]:
    b = x.shape[0]
    kept = x.new_empty((b, keep), dtype=torch.int64)
    return x.new_empty(b, keep, x.shape[2]), along.new_empty(b, keep), kept


def lowering(x: Tensor, score: Tensor, along: Tensor, *options: Any) -> Pruned:
    """One after the other."""
    kept = select_tokens.lowering(score, *options)
    return gather_tokens.lowering(x, kept, 1), gather_tokens.lowering(along, kept, 1), kept


def axes(found: AxisMap, node: Node) -> tuple[Dims, ...]:
    """What is left of the tokens, channels stay."""
    batch, tokens, channels = arg_dims(found, node, 0)
    left = reduced(node, tokens, value(node)[2].shape[1])
    return (batch, left, channels), (batch, left), (batch, left)


def samples() -> list[tuple[object, ...]]:
    """Those of select_tokens, with values of odd and even width."""
    draw = torch.Generator().manual_seed(8)
    made: list[tuple[object, ...]] = []
    for place, (score, *options) in enumerate(select_tokens.samples()):
        assert isinstance(score, Tensor)
        x = torch.randn(*score.shape, (5, 16)[place % 2], generator=draw)
        made.append((x, score, torch.rand(score.shape, generator=draw), *options))
    return made


# --- on a GPU ---------------------------------------------------------------------------------

TOKENS = 4096
"""The most tokens that are worth counting: the work grows with the square of their number."""


def body(
    x: Value, score: Value, along: Value, keep: int, prefix: int, suffix: int
) -> tuple[Value, Value, Value]:
    """Rank by counting, which fixes ties in every runtime, then one flat Gather of rows."""
    batch, tokens = op.Shape(score, start=0, end=1), op.Shape(score, start=1, end=2)
    count = op.Squeeze(tokens)
    place = op.Range(0, count, 1)
    guarded = op.Or(op.Less(place, prefix), op.GreaterOrEqual(place, op.Sub(count, suffix)))
    held = op.Where(guarded, HIGH, score)
    mine, other = op.Unsqueeze(held, [2]), op.Unsqueeze(held, [1])
    lower = op.Less(place, op.Unsqueeze(place, [1]))
    ahead = op.Or(op.Greater(other, mine), op.And(op.Equal(other, mine), lower))
    rank = op.ReduceSum(op.Cast(ahead, to=1), [2], keepdims=0)
    stays = op.Cast(op.Less(rank, op.Cast(keep, to=1)), to=1)
    # Behind place p are all k of which at most k - 1 are kept up to p: count these places.
    passed = op.CumSum(stays, 1)
    number = op.Unsqueeze(op.Cast(op.Range(0, keep, 1), to=1), [1])
    before = op.Cast(op.LessOrEqual(op.Unsqueeze(passed, [1]), number), to=1)
    kept = op.Cast(op.ReduceSum(before, [2], keepdims=0), to=7)
    start = op.Mul(op.Unsqueeze(op.Range(0, op.Squeeze(batch), 1), [1]), tokens)
    rows = op.Reshape(x, op.Concat([-1], op.Shape(x, start=2, end=3), axis=0))
    return op.Gather(rows, op.Add(kept, start)), op.GatherElements(along, kept, axis=1), kept


def adapt(x: Tensor, score: Tensor, along: Tensor, *options: Any) -> Pruned:
    """Launch for a fixed number of tokens to keep."""
    keep, prefix, suffix = options
    fixed = isinstance(keep, int) and isinstance(x.shape[1], int)
    if not fixed or x.shape[1] > TOKENS:
        return lowering(x, score, along, *options)
    words = {"keep": keep, "prefix": prefix, "suffix": suffix}
    rows, numbers, kept = call(PLUGIN, (x, score, along), **words)
    return rows, numbers.to(along.dtype), kept


PLUGIN = Plugin(
    name="PruneTokens",
    stem="prune_tokens",
    inputs=(
        Port("x", "T", ("B", "N", "C")),
        Port("score", "float32", ("B", "N")),
        Port("along", "float32", ("B", "N")),
    ),
    outputs=(
        Port("y", "T", ("B", "keep", "C")),
        Port("along_out", "float32", ("B", "keep")),
        Port("kept", "int64", ("B", "keep")),
    ),
    attributes={"keep": int, "prefix": int, "suffix": int},
    scalars=("N", "C", "keep", "prefix", "suffix", "cdiv(keep * C, 16384)"),
    grid=("B", "cdiv(keep * C, 16384)", "1"),
    shared="5 * N + 2 * keep",
    body=body,
    adapt=adapt,
)
"""A block for some rows of a sample: every block chooses anew, which is cheaper than to wait."""

KERNEL = Kernel(torch.ops.effopt.prune_tokens.default, lowering, axes, samples, 0.0, PLUGIN)
