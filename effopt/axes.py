"""Axes: what each dimension of each tensor of a graph is, by identity and not by size.

A dimension is a product of factors, outermost first; each factor is an `Axis`. A dimension of
size 1 is the empty product `()`. Rules by operator family (`effopt.axis_rules`) carry axes
through the graph and unify them where an operator needs two dimensions to be the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from effopt.program import Program, shape

Size = Any
"""An int, or a torch.SymInt of the program's shape environment."""


class Axis:
    """One identity. A bound axis stands for the factors that it was found to be made of.

    `cuts` are the axes that know something of themselves (segments, parts, what they were reduced
    from) and were found to be products in which this one is a factor. A `constant` axis was not
    found on data of the sample so far: on weights, position tables and masks alone.
    """

    __slots__ = ("bound", "constant", "cuts", "name", "parts", "reduced_from", "segments", "size")

    def __init__(
        self,
        name: str,
        size: Size,
        segments: "tuple[Segment, ...]" = (),
        parts: "tuple[Part, ...]" = (),
        reduced_from: "Dim" = (),
    ) -> None:
        self.name = name
        self.size = size
        self.segments = segments
        self.parts = parts
        self.reduced_from = reduced_from
        self.constant = False
        self.cuts: tuple[Axis, ...] = ()
        self.bound: Dim | None = None

    def __repr__(self) -> str:
        return self.name


Dim = tuple[Axis, ...]
Dims = tuple[Dim, ...]


@dataclass(frozen=True)
class Segment:
    """Places `start` to `stop` of a concatenated axis; learned ones hold no data of the sample."""

    start: Size
    stop: Size
    learned: bool


@dataclass(frozen=True)
class Part:
    """The places `start` to `stop` of another dimension: what a slice of it counts.

    An axis can be several parts at once, where different slices meet (`x[1:] - x[:-1]`).
    """

    whole: Dim
    start: Size
    stop: Size


class AxisError(Exception):
    """Two dimensions that an operator needs to be one cannot be; caught by the propagation."""


class MixedError(AxisError):
    """Tokens from before and from after a reduction meet: a defect of the pass that made it."""


def same_size(left: Size, right: Size) -> bool:
    """Tell whether two sizes are equal for every input, without adding a guard."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return bool(statically_known_true(left == right))


def same_sizes(left: Sequence[Size], right: Sequence[Size]) -> bool:
    """Tell whether ranks and sizes are equal for every input, without adding a guard."""
    return len(left) == len(right) and all(map(same_size, left, right))


def leaves(dim: Sequence[Axis]) -> Dim:
    """Replace bound axes by what they are made of."""
    found: list[Axis] = []
    for axis in dim:
        if axis.bound is not None:
            axis.bound = leaves(axis.bound)
        found.extend((axis,) if axis.bound is None else axis.bound)
    return tuple(found)


def size_of(dim: Sequence[Axis]) -> Size:
    """Multiply the sizes of the factors."""
    total: Size = 1
    for axis in dim:
        total = total * axis.size
    return total


def fresh(name: str, size: Size) -> Dim:
    """Make a dimension with an identity of its own; size 1 has none."""
    return () if same_size(size, 1) else (Axis(name, size),)


def unify(left: Dim, right: Dim) -> None:
    """Make two dimensions one. Raises AxisError where their factors cannot be matched."""
    a, b = list(leaves(left)), list(leaves(right))
    while a and b:
        x, y = a.pop(0), b.pop(0)
        if x is y:
            continue
        if same_size(x.size, y.size):
            bind(y, (x,))
        elif not b and same_size(y.size, size_of([x, *a])):
            bind(y, (x, *a))
            return
        elif not a and same_size(x.size, size_of([y, *b])):
            bind(x, (y, *b))
            return
        else:
            x, y = _cut_to_match(x, y, a, b)
            bind(y, (x,))
    if a or b:
        raise AxisError(f"{show(left)} meets {show(right)}")


def bind(axis: Axis, dim: Dim) -> None:
    """Let an axis stand for a dimension; the kept one is the one that knows more of itself."""
    if len(dim) == 1 and _knows(axis) > _knows(dim[0]):
        axis, dim = dim[0], (axis,)
    if axis in dim:
        raise AxisError(f"{axis} would be a part of itself in {show(dim)}")
    whole = {a for other in dim for a in _history(other)}
    if axis in whole or set(_history(axis)) & set(dim):
        raise MixedError(f"{axis} before and after a reduction meet")
    if len(dim) == 1:
        dim[0].parts = (*dim[0].parts, *(part for part in axis.parts if part not in dim[0].parts))
    cuts = (*axis.cuts, *((axis,) if len(dim) > 1 and _knows(axis) else ()))
    for factor in dim:
        factor.cuts = (*factor.cuts, *(cut for cut in cuts if cut not in factor.cuts))
        factor.constant = factor.constant and axis.constant
    axis.bound = dim


def _knows(axis: Axis) -> int:
    return 2 * bool(axis.reduced_from) + bool(axis.segments) + bool(axis.parts)


def _history(axis: Axis) -> Dim:
    """Return the axes that a reduced axis came from, nearest first."""
    found: list[Axis] = []
    for own in (axis, *axis.cuts):
        for before in leaves(own.reduced_from):
            found += [before, *_history(before)]
    return tuple(found)


def _cut_to_match(x: Axis, y: Axis, a: list[Axis], b: list[Axis]) -> tuple[Axis, Axis]:
    """Cut the larger of two unequal factors so that both begin with factors of one size."""
    if divide(x.size, y.size) is not None:
        outer, inner = split(x, y.size)
        a.insert(0, inner)
        return outer, y
    if divide(y.size, x.size) is not None:
        outer, inner = split(y, x.size)
        b.insert(0, inner)
        return x, outer
    raise AxisError(f"{x} of {x.size} does not fit {y} of {y.size}")


def split(axis: Axis, outer: Size) -> tuple[Axis, Axis]:
    """Cut an axis into two new identities, outer times inner, and bind it to them."""
    first = Axis(f"{axis.name}:{outer}", outer)
    second = Axis(f"{axis.name}:", divide(axis.size, outer))
    first.constant = second.constant = True  # bind says otherwise if the whole is data
    bind(axis, (first, second))
    return first, second


def divide(whole: Size, part: Size) -> Size | None:
    """Divide two sizes; None where the result is not known to be whole for every input."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part > 0 and whole % part == 0 else None
    below = expression(part)
    ratio = sympy.cancel(expression(whole) / below) if below != 0 else sympy.nan
    if ratio.is_Integer:
        return int(ratio)
    return whole // part if ratio.is_integer else None


def expression(size: Size) -> Any:
    """Return the sympy expression of a size."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def show(dim: Dim) -> str:
    """Write a dimension for an error or a table: `tokens`, `batch·head`, `1`."""
    return "·".join(axis.name for axis in leaves(dim)) or "1"


@dataclass
class AxisMap:
    """The dims of every tensor of a program, and the nodes where the rules gave out.

    `dims` maps a node to its Dims (a tuple of Dims where it yields several tensors);
    `unknown` maps a node to the reason why its dims are fresh guesses of nothing; `mixed` holds
    those of them where tokens from before and after a reduction meet. `anew` holds, by reader and
    constant, the dims that a reader found when another had claimed the constant's own.
    """

    dims: dict[Node, Any] = field(default_factory=dict)
    unknown: dict[Node, str] = field(default_factory=dict)
    mixed: dict[Node, str] = field(default_factory=dict)
    anew: dict[tuple[Node, Node], Dims] = field(default_factory=dict)

    def of(self, node: Node) -> Dims:
        """Return the dims of a node that yields one tensor, with bound axes resolved."""
        return tuple(leaves(dim) for dim in self.dims[node])


@dataclass
class Propagation(AxisMap):
    """An AxisMap while it grows: what holds no data of the sample is read anew by each reader.

    One table of positions can be added to two sequences, and one `arange` can make the masks of
    both: that their sizes are equal does not make them one.
    """

    constant: set[Node] = field(default_factory=set)
    reader: Node | None = None

    def of(self, node: Node) -> Dims:
        """Return dims for a rule: those of a constant that data has claimed are made anew."""
        dims = super().of(node)
        if node not in self.constant:
            return dims
        read = tuple(tuple(map(_unclaimed, dim)) for dim in dims)
        if read != dims and self.reader is not None:
            self.anew[self.reader, node] = read
        return read

    def put(self, node: Node, dims: Any, constant: bool) -> None:
        """Note what a rule found."""
        self.dims[node] = dims
        if constant:
            self.constant.add(node)
            for axis in pytree.tree_leaves(dims):
                axis.constant = axis.bound is None or axis.constant


def _unclaimed(axis: Axis) -> Axis:
    if axis.constant:
        return axis
    made = Axis(axis.name, axis.size)
    made.constant = True
    return made


def find_axes(program: Program) -> AxisMap:
    """Propagate axes through a program, once, in execution order (an Analysis)."""
    from effopt.axis_table import propagate

    found = Propagation()
    for node in program.nodes():
        propagate(found, node)
    return AxisMap(found.dims, found.unknown, found.mixed, found.anew)


def fresh_dims(node: Node) -> Dims:
    """Give every dimension of a node an identity of its own."""
    return tuple(fresh(f"{node.name}.{place}", size) for place, size in enumerate(shape(node)))
