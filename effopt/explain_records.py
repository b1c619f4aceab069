"""What an explanation is made of: one record a thing found, all plain data."""

from dataclasses import dataclass

from effopt.errors import EffoptError, PreconditionError
from effopt.program import Place, place_of

Size = int | str
"""A fixed size, or the name of a dynamic one."""


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be done: where, why, and what to do."""

    place: Place
    reason: str
    remedy: str

    @staticmethod
    def of(error: EffoptError) -> "Refusal":
        """Read an error of ours."""
        place = place_of(error.node) if isinstance(error, PreconditionError) else Place()
        return Refusal(place, error.reason, error.remedy)


@dataclass(frozen=True)
class InputRow:
    """One input tensor of the model."""

    name: str
    dtype: str
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class SiteRow:
    """One block: where tokens may leave, or the reason why not and what to do."""

    block: int
    place: Place
    usable: bool
    refusal: Refusal | None


@dataclass(frozen=True)
class Technique:
    """What became of trying a pass, with the options of `spec`, on a token axis."""

    spec: str
    possible: bool
    refusal: Refusal | None


@dataclass(frozen=True)
class AxisRow:
    """One token axis. Sizes are numbers or names; `effects` counts operators by effect.

    `made_by` is the first operator whose value counts these tokens. `emitted` says that an output
    names every token. `techniques` are the passes that were tried on the axis, by name.
    """

    name: str
    size: Size
    batch: Size
    made_by: Place
    prefix: int
    suffix: int
    picks: tuple[int, ...]
    emitted: bool
    causal: bool
    padding: bool
    techniques: dict[str, Technique]
    effects: dict[str, int]
    sites: tuple[SiteRow, ...]


@dataclass(frozen=True)
class CallRow:
    """One attention call: which tokens ask, which are asked, and what its mask does.

    `queries` and `keys` name token axes, "" for places that are none, with their number. `mask` is
    "none" or several of padding, causal, pairs (hides by query and key) and bias, with `+`.
    """

    block: int
    place: Place
    queries: str
    queries_size: Size
    keys: str
    keys_size: Size
    cross: bool
    heads: Size
    head_dim: Size
    causal: bool
    mask: str


@dataclass(frozen=True)
class ExitRow:
    """A value behind a block that carries everything: the model could end there.

    `share` is the part of the multiply-accumulates done by then, None where it cannot be counted.
    """

    block: int
    place: Place
    share: float | None


@dataclass(frozen=True)
class GroupRow:
    """Linear layers that read the same channels, and so share the scales of these.

    `source` is the value that they read, made by an operator of `family`, of so many `channels`
    with so many `scales`. `kind` says who takes a scale up: constants that `producers` read
    ("folded", or "tied" where channels share scales), a multiplication that is added ("mul", as
    `pinned` keeps the value as it is), or nobody ("none", as `pinned` is true of the weights).
    """

    source: Place
    family: str
    linears: tuple[str, ...]
    kind: str
    channels: Size
    scales: Size
    producers: tuple[str, ...]
    pinned: str


@dataclass(frozen=True)
class UnknownRow:
    """An operator that the axis analysis could not follow."""

    place: Place
    reason: str
