"""What the head of an exit reads of the residual stream: tokens, their mean, or every token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch.fx import Node

from effopt.axes import find_axes, leaves
from effopt.cuts import Cut
from effopt.effects import effect
from effopt.errors import PreconditionError
from effopt.masks import Padding, find_padding
from effopt.picks import find_protected
from effopt.program import Program, shape, where
from effopt.sites import find_tokens
from effopt.tokens import Kind, Tokens


@dataclass(frozen=True)
class Stream:
    """The residual stream at a cut: `samples` is its dimension of samples, channels come last."""

    cut: Cut
    samples: int

    @property
    def node(self) -> Node:
        """The value behind the block."""
        return self.cut.node

    @property
    def tokens(self) -> tuple[int, ...]:
        """The dimensions that are neither samples nor channels."""
        return tuple(n for n in range(len(shape(self.node)) - 1) if n != self.samples)

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return int(shape(self.node)[-1])


@dataclass(frozen=True)
class Reads:
    """The tokens at `places` (negative from the end), side by side, and the mean over all of them.

    With neither, it is every token by itself, which is what a lens maps.
    """

    places: tuple[int, ...] = ()
    mean: bool = False

    @property
    def is_lens(self) -> bool:
        """Whether every token is read by itself."""
        return not self.places and not self.mean

    def features(self, stream: Stream) -> int:
        """Return how many features a head reads: F."""
        return stream.channels * max(1, len(self.places) + self.mean)

    def __str__(self) -> str:
        parts = [_named(place) for place in self.places] + ["the mean"] * self.mean
        return " and ".join(parts) or "every token"


def _named(place: int) -> str:
    return {0: "the first token", -1: "the last token"}.get(place, f"token {place}")


POOLS: Mapping[str, Reads] = MappingProxyType(
    {
        "first": Reads((0,)),
        "last": Reads((-1,)),
        "mean": Reads((), True),
        "first-mean": Reads((0,), True),
    }
)
"""What a ridge head can be told to read."""

SAY = "say what heads read (pool=first, last, mean or first-mean), or use head=lens"


def reads_of(program: Program, streams: Sequence[Stream], tail: Sequence[Node]) -> Reads:
    """Find what a model's own outputs read of the tokens behind the last block.

    The last of `streams` is that behind it, and the `tail` what follows. Tokens that are picked
    there are read, and the mean if outputs average. Where nothing hides tokens, the mean is read
    beside picked tokens too. Raises PreconditionError where outputs pick by a place that inputs
    say, average while attention hides tokens, or do neither.
    """
    last = streams[-1]
    place = where(last.node)
    if len(last.tokens) != 1:
        raise PreconditionError(place, "it cannot be told which of its sizes are tokens", SAY)
    tokens = _tokens(program, last)
    effects = {node: found for node in tail if (found := effect(node, tokens)) is not None}
    kept = find_protected(effects, tokens, set(tail))
    if kept.marks:
        reason = "outputs read a token at a place that the inputs say"
        raise PreconditionError(place, reason, SAY)
    averages = any(found.kind is Kind.POOL for found in effects.values())
    hidden = _why_hidden(program, streams)
    if averages and hidden:
        raise PreconditionError(place, f"outputs average over tokens, and {hidden}", SAY)
    if not kept.picks and not averages:
        raise PreconditionError(place, "outputs neither pick tokens nor average over them", SAY)
    picks = sorted(kept.picks, key=lambda pick: (pick < 0, pick))
    return Reads(tuple(picks), averages or not hidden)


def _tokens(program: Program, stream: Stream) -> Tokens:
    """Return the tokens of a stream; no attention needs to follow."""
    axes, (place,) = program.get(find_axes), stream.tokens
    dims, size = axes.of(stream.node), shape(stream.node)[place]
    return Tokens(dims[place], size, axes, leaves(dims[stream.samples]))


def _why_hidden(program: Program, streams: Sequence[Stream]) -> str:
    """Say why a plain mean over the tokens would count what must not be counted, or ""."""
    nodes = [stream.node for stream in streams]
    for axis in program.get(find_tokens):
        padding = find_padding(axis) if any(map(axis.tokens.on, nodes)) else Padding()
        if padding.refusal is not None:
            return padding.refusal.reason
        if padding.mask is not None:
            return "attention hides padding"
    return ""
