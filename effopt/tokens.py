"""Tokens: one token axis, which dimensions count it, and the kinds of effects along it."""

from dataclasses import dataclass
from enum import Enum

from torch.fx import Node

from effopt.axes import Axis, AxisMap, Dim, Dims, Size, leaves
from effopt.program import is_tensor


class Kind(Enum):
    """Effects of an operator along a token axis, by what a reduction ahead of it asks for."""

    MAP = "map"
    ATTEND = "attend"
    POOL = "pool"
    PICK = "pick"
    RANGE = "range"
    EMIT = "emit"
    ORDER = "order"


@dataclass(frozen=True)
class Effect:
    """What an operator does along the tokens; `reason` says why ORDER cannot be mended."""

    kind: Kind
    reason: str = ""


@dataclass(frozen=True)
class Range:
    """Tokens `start` to `stop` of a token axis; `pure` if they are a dimension by themselves."""

    start: Size
    stop: Size
    pure: bool


MAP = Effect(Kind.MAP)
BROKEN = "broken"


@dataclass(frozen=True)
class Tokens:
    """One token axis, as the factors of its dimension, in the axes of one program.

    `batch` are the factors over which the samples differ: each keeps other tokens.
    """

    dim: Dim
    size: Size
    axes: AxisMap
    batch: Dim = ()

    def find(self, dim: Dim) -> Range | str | None:
        """Say which tokens a dimension counts: a Range, BROKEN for a piece of a grid, or None."""
        own = leaves(dim)
        if not self._touches(own):
            return None
        width = len(self.dim)
        for place in range(len(own) - width + 1):
            if own[place : place + width] == self.dim:
                return Range(0, self.size, len(own) == width)
        part = self._part(own[0]) if len(own) == 1 else None
        return part or self._cut(own) or BROKEN

    def spots(self, dims: Dims) -> dict[int, Range | str]:
        """Return the dimensions that count tokens."""
        found = ((place, self.find(dim)) for place, dim in enumerate(dims))
        return {place: range_ for place, range_ in found if range_ is not None}

    def on(self, node: Node) -> dict[int, Range | str]:
        """Return the dimensions of a node's value (of any of its values) that count tokens."""
        if node not in self.axes.dims:
            return {}
        if is_tensor(node):
            return self.spots(self.axes.of(node))
        pieces = (self.spots(dims) for dims in self.axes.dims[node])
        return {place: spot for spots in pieces for place, spot in spots.items()}

    def _touches(self, own: Dim) -> bool:
        known = (whole for axis in own for whole in (axis, *axis.cuts))
        return any(axis in self.dim or self._ranges(axis) for axis in known)

    def _cut(self, own: Dim) -> "Range | None":
        """Return the tokens of a range that a view elsewhere cut into the factors found here."""
        for cut in (cut for axis in own for cut in axis.cuts):
            whole, part = leaves((cut,)), self._part(cut)
            for place in range(len(own) - len(whole) + 1):
                if part is not None and own[place : place + len(whole)] == whole:
                    return Range(part.start, part.stop, len(own) == len(whole))
        return None

    def _part(self, axis: Axis) -> "Range | None":
        """Return the tokens that an axis counts; none where two different slices meet in it."""
        ranges = self._ranges(axis)
        one = len({(str(found.start), str(found.stop)) for found in ranges}) == 1
        return ranges[0] if one else None

    def _ranges(self, axis: Axis) -> "list[Range]":
        found: list[Range] = []
        for part in axis.parts:
            whole = leaves(part.whole)
            if whole == self.dim:
                found.append(Range(part.start, part.stop, True))
            elif len(whole) == 1:
                found += [
                    Range(outer.start + part.start, outer.start + part.stop, True)
                    for outer in self._ranges(whole[0])
                ]
        return found
