"""compact_rows: rows of a batch that go on come first, those that are done behind them."""

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims, fresh
from effopt.backends.kernels.common import Value, arg_dims, op
from effopt.kernel import Kernel
from effopt.plugin import Plugin, Port, call
from effopt.program import value


@torch.library.custom_op("effopt::compact_rows", mutates_args=())
def compact_rows(x: Tensor, stay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows [B, ...], order [B] int64 and count [1] int64.

    x [B, ...] floats; stay [B] bool. The first `count` rows are those that stay, in their order,
    the others follow in theirs: rows = x[order]. Sizes do not depend on the data, so what runs
    on a GPU between two segments of early exits can be launched ahead: `count` alone goes to the
    host, for the batch of the next segment, which reads the first rows where they lie. Other
    values of the same rows follow by `gather_tokens` with `order`. `order` leads back too: answers
    y of the rows belong at places order, `out[order] = y`, which is a scatter that writes each
    place once; `order` of one segment, taken at that of the next, is that of both.
    """
    order = torch.argsort((~stay).to(torch.uint8), stable=True)
    return x[order], order, stay.sum(dtype=torch.int64).reshape(1)


@compact_rows.register_fake
def _(x: Tensor, stay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    order, count = (stay.new_empty(shape, dtype=torch.int64) for shape in (stay.shape, (1,)))
    return torch.empty_like(x), order, count


def lowering(x: Tensor, stay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count the rows ahead of each, and scatter its number to its place: nothing is sorted."""
    place = torch.arange(stay.shape[0], device=stay.device)
    upto = stay.to(torch.int64).cumsum(dim=0)
    count = upto[-1:]
    into = torch.where(stay, upto - 1, count + place - upto)
    order = torch.zeros_like(place).scatter(0, into, place)
    return x.index_select(0, order), order, count.clone()


def axes(found: AxisMap, node: Node) -> tuple[Dims, ...]:
    """Rows in another order are no longer those of the batch."""
    x, order = arg_dims(found, node, 0), value(node)[1]
    batch = fresh(f"{node.name}.rows", order.shape[0])
    return (batch, *x[1:]), (batch,), ((),)


def samples() -> list[tuple[object, ...]]:
    """Some, all and no rows stay; vectors, hidden states, one row."""
    draw = torch.Generator().manual_seed(12)
    some = torch.tensor([False, True, True, False, True])
    x = torch.randn(5, 3, 7, generator=draw)
    ends = [(x, torch.full((5,), flag)) for flag in (True, False)]
    wide = torch.randn(5, 40, 128, generator=draw)
    return [(x, some), *ends, (x[:, 0, 0], some), (wide, ~some), (x[:1], some[:1])]


# --- on a GPU ---------------------------------------------------------------------------------


def body(x: Value, stay: Value) -> tuple[Value, Value, Value]:
    """Count the rows ahead of each, and scatter its number to its place."""
    flags = op.Cast(stay, to=7)
    upto = op.CumSum(flags, 0)
    count = op.ReduceSum(flags, [0], keepdims=1)
    size = op.Shape(stay)
    place = op.Range(0, op.Squeeze(size), 1)
    into = op.Where(op.Cast(stay, to=9), op.Sub(upto, 1), op.Sub(op.Add(count, place), upto))
    order = op.ScatterElements(op.Sub(place, place), into, place, axis=0)
    return op.Gather(x, order, axis=0), order, count


def adapt(x: Tensor, stay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Launch on floats, a row's values flattened."""
    if not x.is_floating_point():
        return lowering(x, stay)
    rows, order, count = call(PLUGIN, (x.reshape(x.shape[0], -1), stay))
    return rows.reshape(x.shape), order, count


PLUGIN = Plugin(
    name="CompactRows",
    stem="compact_rows",
    inputs=(Port("x", "T", ("B", "R")), Port("stay", "int32", ("B",))),
    outputs=(
        Port("rows", "T", ("B", "R")),
        Port("order", "int64", ("B",)),
        Port("count", "int64", ("1",)),
    ),
    scalars=("B", "R"),
    grid=("B * cdiv(R, 4096)", "1", "1"),
    body=body,
    adapt=adapt,
)

KERNEL = Kernel(torch.ops.effopt.compact_rows.default, lowering, axes, samples, 0.0, PLUGIN)
