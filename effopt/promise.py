"""What a calibration of exits promises, and what new data say of it. Free of torch.

Sources: conformal risk control (arXiv 2208.02814), learn then test (2110.01052), betting
(2010.09686); the rules are in `effopt.risk`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effopt.errors import UnsafeFileError

Array = NDArray[Any]


@dataclass(frozen=True)
class Promise:
    """The loss of the exits is at most `epsilon`: by `rule`, with probability 1 - `delta`.

    For crc, which has no delta, that is the mean over calibrations. `loss` is of an answer to that
    of `reference`: "self", the engine that never exits, or "original", the model as it was given.
    `output` is what is compared: at the last place of dimension `position` alone, or everywhere
    (None). `unit` is what is drawn independently. `samples` of them calibrated, `fitted` other rows
    fitted heads and the grid, `rows` is the hash of all, and `engine` ran them. `risk` is their
    mean loss at `tau`, as the rule counts it; `shares` say how many rows leave at each exit, `cost`
    what a row costs, as a part of the whole model. `grid` [K+1, E] are the thresholds that were
    tried, in order, with the mean loss and its bound at each in `risks` and `bounds`; `index` is
    the one that was taken. `graph` is the hash of the program.
    """

    rule: str
    epsilon: float
    delta: float | None
    loss: str
    reference: str
    unit: str
    output: str
    position: int | None
    samples: int
    fitted: int
    rows: str
    engine: str
    graph: str
    tau: tuple[float, ...]
    index: int
    risk: float
    shares: tuple[float, ...]
    cost: float
    grid: tuple[tuple[float, ...], ...]
    risks: tuple[float, ...]
    bounds: tuple[float, ...]

    @property
    def exits(self) -> bool:
        """Tell whether any row may leave early."""
        return self.index > 0

    def words(self) -> str:
        """Say the promise in a line."""
        what = {"self": "the engine that never exits", "original": "the original model"}
        level = "on average" if self.delta is None else f"with {1 - self.delta:.0%} confidence"
        return (
            f"{self.loss} against {what[self.reference]} at most {self.epsilon:.2%} {level} "
            f"({self.rule}, {self.samples} {self.unit}s)"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON types; the threshold that is never reached is None."""
        record = asdict(self)
        record["tau"] = _plain(self.tau)
        record["grid"] = [_plain(row) for row in self.grid]
        return record

    @staticmethod
    def from_json(record: Any) -> "Promise":
        """Read the record back; what is missing or of a wrong type is an UnsafeFileError."""
        try:
            given = dict(record)
            given["tau"] = _thresholds(given["tau"])
            given["grid"] = tuple(_thresholds(row) for row in given["grid"])
            for name in ("shares", "risks", "bounds"):
                given[name] = tuple(float(x) for x in given[name])
            made = Promise(**given)
        except (KeyError, TypeError, ValueError) as error:
            raise UnsafeFileError(f"the promise of the exits is damaged: {error}") from error
        if made.loss not in LOSSES or made.reference not in ("self", "original"):
            raise UnsafeFileError(f"the promise of the exits is damaged: loss {made.loss!r:.40}")
        return made


def _plain(row: Sequence[float]) -> list[float | None]:
    return [None if np.isinf(x) else float(x) for x in row]


def _thresholds(row: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(float("inf") if x is None else float(x) for x in row)


# --- losses -----------------------------------------------------------------------------------


def _disagree(got: Array, want: Array) -> Array:
    """Tell for each position whether the largest logit is another."""
    return np.asarray(got.argmax(-1) != want.argmax(-1), np.float64)


def _kl(got: Array, want: Array) -> Array:
    """KL divergence from what is wanted, in nats, of at most 1."""
    p, q = _log_softmax(want), _log_softmax(got)
    return np.asarray(np.clip((np.exp(p) * (p - q)).sum(-1), 0.0, 1.0))


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    made = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return np.asarray(np.maximum(made, -1e4))  # of what is hidden: 0 times infinity is no number


def _cosine(got: Array, want: Array) -> Array:
    """Half of what the cosine lacks to 1: 0 for the same direction, 1 for the opposite."""
    one, two = got.astype(np.float64), want.astype(np.float64)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
    cosine = (one * two).sum(-1) / np.maximum(lengths, 1e-12)
    return np.asarray(np.clip((1 - cosine) / 2, 0.0, 1.0))


LOSSES: Mapping[str, Callable[[Array, Array], Array]] = MappingProxyType(
    {"disagree": _disagree, "kl": _kl, "cosine": _cosine}
)
"""Losses in [0, 1] of what an exit answers against what is wanted: [B, ..., C] to [B, ...]."""


def losses_of(kind: str, got: Array, want: Array) -> Array:
    """Return the loss of each row: the mean over its positions, [B]."""
    found = LOSSES[kind](got, want)
    return np.asarray(found.reshape(len(found), -1).mean(axis=1))
