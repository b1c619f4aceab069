"""simplify-masks: attention masks in their smallest form.

A mask that is true for every input goes; a padding mask becomes boolean [B, 1, 1, N] (True =
attend), however the model spelled it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from effopt.attention import SDPA, mask_of, qkv_of, with_mask
from effopt.axes import same_size, same_sizes
from effopt.edit import Edit
from effopt.errors import PreconditionError
from effopt.masks import AND, CHOICES
from effopt.passes.mask_terms import MOVED, as_condition, choose
from effopt.pipeline import Outcome
from effopt.program import Program, is_tensor, shape, value

aten = torch.ops.aten


@dataclass(frozen=True)
class SimplifyMasks:
    """Drop masks that are always true; bring padding masks to boolean [B, 1, 1, N]. Exact.

    A row that may attend to nothing has no answer, and may get another one than before.
    """

    name: ClassVar[str] = "simplify-masks"
    exact: ClassVar[bool] = True

    def check(self, program: Program) -> list[PreconditionError]:
        """Accept every program."""
        return []

    def run(self, program: Program) -> Outcome:
        """Simplify boolean algebra in execution order, then the mask of each attention call."""
        edit = Edit(program, self.name)
        masked = [n for n in program.nodes() if n.target is SDPA and mask_of(n) is not None]
        small = sum(_as_conditions(edit, node) for node in masked)
        known: dict[Node, Fact] = {}
        for node in list(program.nodes()):
            fact = _fact(node, known, program)
            if fact is not None:
                known[node] = fact
            _simplify(edit, node, known)
        dropped = sum(_drop_true(edit, node, known) for node in masked)
        small += sum(_unexpanded(edit, node) for node in masked if mask_of(node) is not None)
        changed = edit.close()
        note = f"{dropped} masks were always true, {small} became smaller"
        return Outcome(changed, (note,) if changed else ("no mask to simplify",))


@dataclass(frozen=True)
class Fact:
    """All elements lie in low..high; equal bounds mean that all elements are that number."""

    low: float
    high: float

    def always(self, wanted: float) -> bool:
        """Tell whether every element is that number."""
        return self.low == self.high == wanted


def _fact(node: Node, known: dict[Node, Fact], program: Program) -> Fact | None:
    """Bound the elements of integer and boolean tensors, without looking at inputs."""
    if not is_tensor(node):
        return None
    if node.op == "get_attr":
        return _bounds(program.weight(node))
    source = node.args[0] if node.args else None
    if node.target in CREATED:
        return CREATED[node.target](node)
    if node.target in COMPARED and source in known:
        return COMPARED[node.target](known[source], node.args[1])  # type: ignore[index]
    if node.target in BOTH and all(arg in known and _is_bool(arg) for arg in node.args):
        low, high = (BOTH[node.target](*pair) for pair in _corners(node, known))
        return Fact(low, high)
    if node.target in MOVED and source in known:
        return known[source]  # type: ignore[index]
    return None


def _is_bool(node: Any) -> bool:
    return bool(value(node).dtype == torch.bool)


def _corners(node: Node, known: dict[Node, Fact]) -> tuple[tuple[float, float], ...]:
    a, b = (known[arg] for arg in node.args[:2])  # type: ignore[index]
    return (a.low, b.low), (a.high, b.high)


def _bounds(weight: Tensor) -> Fact | None:
    if (
        weight.is_floating_point()
        or weight.is_complex()
        or weight.numel() == 0
        or weight.numel() > 1 << 22
    ):
        return None
    return Fact(float(weight.min()), float(weight.max()))


def _created(fill: float | None) -> Callable[[Node], Fact | None]:
    def fact(node: Node) -> Fact | None:
        number = fill if fill is not None else node.args[1]
        return Fact(number, number) if isinstance(number, (int, float)) else None

    return fact


def _from_zero(node: Node) -> Fact:
    return Fact(0, math.inf)


def _compared(least: Callable[[Fact, float], bool], never: Callable[[Fact, float], bool]) -> Any:
    def fact(found: Fact, other: object) -> Fact | None:
        if not isinstance(other, (int, float)):
            return None
        if least(found, other):
            return Fact(1, 1)
        return Fact(0, 0) if never(found, other) else None

    return fact


def _simplify(edit: Edit, node: Node, known: dict[Node, Fact]) -> None:
    """Apply the rules of boolean algebra, and read an index by all places as the identity."""
    if node.target in AND:
        pair = [arg for arg in node.args[:2] if isinstance(arg, Node) and _is_bool(arg)]
        for one, other in (pair, pair[::-1]) if len(pair) == 2 else ():
            if one in known and known[one].always(1):
                edit.replace(node, _spread(edit, other, one, node))
                return
    if node.target in CHOICES and node.args[0] in known:
        seen, kept = node.args[:2]
        same = isinstance(kept, Node) and value(kept).dtype == value(node).dtype
        if same and known[seen].always(1) and _reach(node, kept, seen):  # type: ignore[index]
            edit.replace(node, _spread(edit, kept, seen, node))  # type: ignore[arg-type]
            return
    if node.target is aten.index.Tensor:
        _index_by_places(edit, node)


def _reach(node: Node, *parts: Any) -> bool:
    """Tell whether parts broadcast to the shape of a node by themselves."""
    shapes, wanted = [shape(part) for part in parts], shape(node)
    return all(
        any(len(own) >= back and same_size(own[-back], wanted[-back]) for own in shapes)
        for back in range(1, len(wanted) + 1)
    )


def _spread(edit: Edit, small: Node, true: Node, like: Node) -> Node:
    """Expand `small` to what broadcasting it against `true` gives, the shape of `like`."""
    own, wanted = shape(small), shape(like)
    padded = (*([1] * (len(wanted) - len(own))), *own)
    if same_sizes(own, wanted):
        return small
    with edit.before(like):
        sizes = [
            -1
            if same_size(have, want) and place >= len(wanted) - len(own)
            else want
            if isinstance(want, int)
            else edit.call(aten.sym_size.int, true, place - len(wanted))
            for place, (have, want) in enumerate(zip(padded, wanted, strict=True))
        ]
        return edit.call(aten.expand.default, small, sizes)


def _index_by_places(edit: Edit, node: Node) -> None:
    """x[arange(B)[:,None,None,None], arange(N)] is x[:, None, None, :]."""
    x, indices = node.args[0], node.args[1]
    if not isinstance(x, Node) or not isinstance(indices, (list, tuple)):
        return
    if len(indices) != len(shape(x)):
        return
    rank, spots = len(shape(node)), list[int]()
    for place, index in enumerate(indices):
        spot = _place_counted(index, shape(x)[place], rank)
        if spot is None:
            return
        spots.append(spot)
    if spots != sorted(set(spots)):
        return
    with edit.before(node):
        result = x
        for spot in range(rank):
            if spot not in spots:
                result = edit.call(aten.unsqueeze.default, result, spot)
    edit.replace(node, result)


def _place_counted(index: Any, size: Any, rank: int) -> int | None:
    """Return the dimension along which an index counts 0, 1, 2 ... up to the whole size."""
    if not isinstance(index, Node):
        return None
    sizes = shape(index)
    long = [place for place, own in enumerate(sizes) if not same_size(own, 1)]
    if len(long) != 1 or not same_size(sizes[long[0]], size) or not _counts(index):
        return None
    return long[0] + rank - len(sizes)


def _counts(node: Node) -> bool:
    """Tell whether a node is arange(n), seen through changes of shape."""
    while node.target in MOVED:
        assert isinstance(node.args[0], Node)
        node = node.args[0]
    if node.op == "get_attr":
        held = getattr(node.graph.owning_module, str(node.target), None)
        flat = held.reshape(-1) if isinstance(held, Tensor) else torch.ones(1)
        return bool(torch.equal(flat, torch.arange(flat.numel())))
    return node.target is aten.arange.default and len(node.args) == 1


def _drop_true(edit: Edit, attention: Node, known: dict[Node, Fact]) -> bool:
    """Drop a mask all of whose elements are true, or add nothing."""
    mask = mask_of(attention)
    neutral = 1 if mask is not None and value(mask).dtype == torch.bool else 0
    if mask not in known or not known[mask].always(neutral):
        return False
    _set_mask(edit, attention, None)
    return True


def _set_mask(edit: Edit, attention: Node, mask: Node | None) -> None:
    args, kwargs = with_mask(attention, qkv_of(attention), mask)
    edit.update(attention, *args, **kwargs)


def _as_conditions(edit: Edit, attention: Node) -> bool:
    """Read what an additive mask hides as conditions; as one, where it adds nothing else."""
    mask = mask_of(attention)
    assert mask is not None
    condition = as_condition(edit, mask)
    if condition is not None:
        _set_mask(edit, attention, condition)
    return condition is not None or choose(edit, mask) > 0


def _unexpanded(edit: Edit, attention: Node) -> bool:
    """Read the mask before it was expanded."""
    mask = small = mask_of(attention)
    assert small is not None
    while small.target is aten.expand.default and len(shape(small.args[0])) == 4:  # type: ignore[arg-type]
        small = small.args[0]  # type: ignore[assignment]
    if small is not mask:
        _set_mask(edit, attention, small)
    return small is not mask


CREATED: dict[Any, Callable[[Node], Fact | None]] = {
    aten.arange.default: _from_zero,
    **dict.fromkeys(
        (aten.ones.default, aten.ones_like.default, aten.new_ones.default), _created(1)
    ),
    **dict.fromkeys(
        (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), _created(0)
    ),
    aten.full.default: _created(None),
    aten.full_like.default: _created(None),
}
COMPARED: dict[Any, Callable[[Fact, object], Fact | None]] = {
    aten.ge.Scalar: _compared(lambda f, c: f.low >= c, lambda f, c: f.high < c),
    aten.gt.Scalar: _compared(lambda f, c: f.low > c, lambda f, c: f.high <= c),
    aten.le.Scalar: _compared(lambda f, c: f.high <= c, lambda f, c: f.low > c),
    aten.lt.Scalar: _compared(lambda f, c: f.high < c, lambda f, c: f.low >= c),
}
BOTH: dict[Any, Callable[[float, float], float]] = {
    aten.__and__.Tensor: min,
    aten.__or__.Tensor: max,
    aten.logical_and.default: min,
    aten.logical_or.default: max,
}
