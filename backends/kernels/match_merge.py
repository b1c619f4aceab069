"""match_merge: match_tokens and the merge_tokens of its result in one launch.

No pass puts it into a graph: `effopt.backends.fuse` does, for targets with plugins.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims, fresh
from effopt.backends.kernels import match_tokens, merge_tokens
from effopt.backends.kernels.common import Value, arg_dims, op, reduced
from effopt.backends.kernels.match_tokens import ONTO_PAD, PAD, PROTECTED
from effopt.backends.kernels.merge_tokens import LEAST, TINY
from effopt.kernel import Kernel
from effopt.plugin import Plugin, Port, call
from effopt.program import value

Merged = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("effopt::match_merge", mutates_args=())
def match_merge(
    metric: Tensor,
    x: Tensor,
    size: Tensor,
    r: int,
    keep: int,
    prefix: int,
    suffix: int,
    ordered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Merge r tokens of x [B, N, C] into those whose metric [B, N, D] is most like their own.

    Returns y [B, keep, C] in the dtype of x and the summed size [B, keep] float32 of
    `merge_tokens`, then kept, source and target of `match_tokens`, whose arguments these are.
    """
    options = (r, keep, prefix, suffix, ordered)
    chosen = match_tokens.KERNEL.op(metric, size, *options)
    return (*merge_tokens.KERNEL.op(x, size, *chosen), *chosen)


@match_merge.register_fake
def _(
    metric: Tensor,
    x: Tensor,
    size: Tensor,
    r: int,
    keep: int,
    prefix: int,
    suffix: int,
    ordered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b = x.shape[0]
    kept, source, target = (x.new_empty((b, n), dtype=torch.int64) for n in (keep, r, r))
    left = x.new_empty(b, keep, x.shape[2])
    return left, x.new_empty((b, keep), dtype=torch.float32), kept, source, target


def lowering(metric: Tensor, x: Tensor, size: Tensor, *options: Any) -> Merged:
    """One after the other."""
    chosen = match_tokens.lowering(metric, size, *options)
    return (*merge_tokens.lowering(x, size, *chosen), *chosen)


def axes(found: AxisMap, node: Node) -> tuple[Dims, ...]:
    """Tokens become the kept ones, channels stay; source and target share a new axis."""
    batch, tokens, channels = arg_dims(found, node, 1)
    _, _, kept, source, _ = value(node)
    left = reduced(node, tokens, kept.shape[1])
    pair = fresh(f"{node.name}.pairs", source.shape[1])
    return (batch, left, channels), (batch, left), (batch, left), (batch, pair), (batch, pair)


def samples() -> list[tuple[object, ...]]:
    """Those of match_tokens with values of odd and even width, and one with many to one."""
    draw = torch.Generator().manual_seed(7)
    made: list[tuple[object, ...]] = []
    for place, (metric, size, *options) in enumerate(match_tokens.samples()):
        assert isinstance(metric, Tensor)
        x = torch.randn(*metric.shape[:2], (5, 16)[place % 2], generator=draw)
        made.append((metric, x, size, *options))
    metric, x = (torch.randn(2, 46, c, generator=draw) for c in (3, 24))
    size = torch.rand(2, 46, generator=draw) + 1.0
    return [*made, (metric, x, size, 20, 26, 1, 1, False)]


# --- on a GPU ---------------------------------------------------------------------------------

TOKENS = 3072
"""The most tokens of which the work of one block fits into its shared memory."""


def body(
    metric: Value, x: Value, size: Value, r: int, prefix: int, suffix: int, ordered: int
) -> tuple[Value, Value, Value, Value, Value]:
    """Rank by counting, which fixes ties in every runtime; copy rows, then mend the targets."""
    batch, tokens = op.Shape(size, start=0, end=1), op.Shape(size, start=1, end=2)
    count = op.Squeeze(tokens)
    stop, place = count - suffix, op.Range(0, count, 1)
    guarded = op.Or(place < prefix, place >= stop)
    wide, real = op.Cast(metric, to=1), size > 0.0
    unit = wide / op.Max(op.ReduceL2(wide, [-1], keepdims=1), 1e-12)
    even, odd = op.Slice(unit, [0], tokens, [1], [2]), op.Slice(unit, [1], tokens, [1], [2])
    onto = op.Where(guarded, PROTECTED, op.Where(real, 1.0, ONTO_PAD))
    most = op.Unsqueeze(op.Slice(onto, [1], tokens, [1], [2]), [1])
    score = op.Min(op.MatMul(even, op.Transpose(odd, perm=[0, 2, 1])), most)
    floor = op.Where(guarded, PROTECTED, op.Where(real, 1.0, PAD))
    own = op.Slice(floor, [0], tokens, [1], [2])
    best = op.Where(own < 0.0, own, op.ReduceMax(score, [2], keepdims=0))
    # Choose r of them: those with less than r ahead.
    mine, other = op.Unsqueeze(best, [2]), op.Unsqueeze(best, [1])
    half = op.Range(0, op.Div(count + 1, 2), 1)
    tied = op.And(other == mine, half < op.Unsqueeze(half, [1]))
    rank = op.ReduceSum(op.Cast(op.Or(other > mine, tied), to=1), [2])
    hits = op.Cast(rank == op.Cast(op.Range(0, r, 1), to=1), to=1)
    chosen, partner = op.ArgMax(hits, axis=1, keepdims=0), op.ArgMax(score, axis=2, keepdims=0)
    source, target = 2 * chosen, 2 * op.GatherElements(partner, chosen, axis=1) + 1
    # Number the places in the order of the result.
    skipped = op.Div(op.Add(prefix, 1), 2)
    evens = op.Div(stop + 1, 2) - skipped
    odds = evens + op.Div(place, 2) - op.Div(prefix, 2)
    inner = op.Where(place % 2 == 1, odds, op.Div(place + 1, 2) - skipped)
    turns = op.Where(op.Or(guarded, op.Equal(ordered, 1)), place, inner + prefix)
    # The kept one with k ahead is behind all sources that have at most k kept ahead.
    gone, onto_turn = op.Gather(turns, source), op.Unsqueeze(op.Gather(turns, target), [2])
    each, others = op.Unsqueeze(gone, [2]), op.Unsqueeze(gone, [1])
    ahead = others - op.ReduceSum(op.Cast(each < others, to=7), [1])
    number = op.Range(0, count - r, 1)
    early = op.ReduceSum(op.Cast(ahead <= op.Unsqueeze(number, [1]), to=7), [2], keepdims=0)
    kept = op.Gather(op.ScatterElements(place, turns, place, axis=0), number + early)
    spot = onto_turn - op.ReduceSum(op.Cast(others < onto_turn, to=7), [2])
    # Average for each source; those of one target are the same, and all are written.
    weight = op.Max(size, TINY)
    lost = op.Unsqueeze(op.GatherElements(weight, source, axis=1), [2])
    held = op.Unsqueeze(op.GatherElements(weight, target, axis=1), [2])
    same = op.Cast(op.Unsqueeze(target, [2]) == op.Unsqueeze(target, [1]), to=1)
    total = held + op.MatMul(same, lost)
    sample = op.Unsqueeze(op.Range(0, op.Squeeze(batch), 1), [1])
    start = sample * tokens
    rows = op.Reshape(x, op.Concat([-1], op.Shape(x, start=2, end=3), axis=0))
    leaving = op.MatMul(same, op.Cast(op.Gather(rows, source + start), to=1) * lost)
    staying = op.Cast(op.Gather(rows, target + start), to=1) * held
    mean = op.CastLike((staying + leaving) / total, x)
    spots = op.Concat(op.Expand(op.Unsqueeze(sample, [2]), op.Shape(spot)), spot, axis=2)
    y = op.ScatterND(op.Gather(rows, kept + start), spots, mean)
    summed = op.ScatterND(op.GatherElements(weight, kept, axis=1), spots, op.Squeeze(total, [2]))
    return y, op.Where(summed < LEAST, 0.0, summed), kept, source, target


def adapt(metric: Tensor, x: Tensor, size: Tensor, *options: Any) -> Merged:
    """Launch for one float type and a fixed number of tokens."""
    r, _, prefix, suffix, ordered = options
    fixed = isinstance(r, int) and isinstance(x.shape[1], int)
    if not fixed or r < 1 or x.shape[1] > TOKENS or metric.dtype != x.dtype:
        return lowering(metric, x, size, *options)
    words = {"r": r, "prefix": prefix, "suffix": suffix, "ordered": int(ordered)}
    y, summed, kept, source, target = call(PLUGIN, (metric, x, size), **words)
    return y, summed, kept, source, target


PLUGIN = Plugin(
    name="MatchMerge",
    stem="match_merge",
    inputs=(
        Port("metric", "T", ("B", "N", "D")),
        Port("x", "T", ("B", "N", "C")),
        Port("size", "float32", ("B", "N")),
    ),
    outputs=(
        Port("y", "T", ("B", "N - r", "C")),
        Port("size_out", "float32", ("B", "N - r")),
        Port("kept", "int64", ("B", "N - r")),
        Port("source", "int64", ("B", "r")),
        Port("target", "int64", ("B", "r")),
    ),
    attributes={"r": int, "prefix": int, "suffix": int, "ordered": int},
    scalars=("N", "D", "C", "r", "prefix", "suffix", "ordered", "cdiv(64, B)"),
    grid=("B", "cdiv(64, B)", "1"),
    shared="24576 + 4 * N + 6 * cdiv(N, 2)",
    body=body,
    adapt=adapt,
)
"""About 64 blocks at the least: those of one sample find the same matching and share its rows."""

KERNEL = Kernel(torch.ops.effopt.match_merge.default, lowering, axes, samples, 1e-6, PLUGIN)
