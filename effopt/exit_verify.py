"""Whether exits keep their promise on rows that had no part in it. Free of torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from effopt.backend import Array
from effopt.class_labels import LABELS, check_classes
from effopt.engine import Engine, bind, has_exits, without_exits
from effopt.errors import UnsafeFileError, UsageError, VerificationError
from effopt.losses import LOSSES, losses_of
from effopt.promise import Promise
from effopt.risk import HeldOut, held_out
from effopt.samples import Samples, open_samples
from effopt.signature import EXIT_INDEX, TAU, Signature, Size

LEVEL = 0.05
"""The delta that new rows are judged at where the rule has none."""
_MOST = 1 << 20
"""Rows from which on a bound is epsilon, to what can be measured."""
CHANCE = 4.0
"""Standard deviations from which on a share of rows is another one."""

Feeds = Mapping[str, Array]
Original = Callable[[Feeds], Mapping[str, Array]]
"""Runs the original model on one batch by input name; its outputs by name."""


@dataclass(frozen=True)
class ExitCheck:
    """What `samples` new rows say of a promise.

    `found` judges their mean loss; the promise is contradicted where its lower bound is above
    `allowed`. `leaves` counts the rows that left at each exit, those that went to the end last.
    """

    promise: Promise
    data: str
    samples: int
    found: HeldOut
    allowed: float
    leaves: tuple[int, ...]

    @property
    def contradicted(self) -> bool:
        """Tell whether the promise does not hold, by all that is likely."""
        return self.found.lower > self.allowed

    @property
    def verdict(self) -> str:
        """Say in a word what became of the promise."""
        if self.contradicted:
            return "contradicted"
        return "confirmed" if self.found.confirmed else "not contradicted"

    @property
    def mean_exit(self) -> float:
        """The exit that a row takes on average, from 1."""
        counts = np.asarray(self.leaves)
        return float(counts @ np.arange(1, len(counts) + 1) / self.samples)

    @property
    def shifted(self) -> tuple[int, ...]:
        """The exits, from 1, at which another part of the rows left when it was calibrated."""
        pairs = enumerate(zip(self.leaves, self.promise.shares, strict=True), 1)
        return tuple(n for n, (count, share) in pairs if self._is_other(count, share))

    def _is_other(self, count: int, share: float) -> bool:
        new, old = self.samples, max(self.promise.samples, 1)
        pooled = (count + share * old) / (new + old)
        spread = sqrt(max(pooled * (1 - pooled), 0.0) * (1 / new + 1 / old))
        return abs(count / new - share) > CHANCE * spread

    def text(self) -> str:
        """Return all figures as text of at most 80 columns."""
        from effopt.exit_verify_text import exit_text

        return exit_text(self)

    def why(self) -> str:
        """Say what contradicts the promise."""
        from effopt.exit_verify_text import why_contradicted

        return why_contradicted(self)

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON types."""
        return {
            "data": self.data,
            "samples": self.samples,
            "unit": self.promise.unit,
            "units": self.found.samples,
            "loss": self.promise.loss,
            "reference": self.promise.reference,
            "rule": self.promise.rule,
            **{k: v for k, v in asdict(self.found).items() if k != "samples"},
            "allowed": self.allowed,
            "verdict": self.verdict,
            "exits": list(self.leaves),
            "mean_exit": self.mean_exit,
            "calibrated_shares": list(self.promise.shares),
            "shifted_exits": list(self.shifted),
        }


def verify_exits(engine: Engine, path: Path, original: Original | None = None) -> ExitCheck:
    """Judge the promise of an engine by the samples of a file (see `effopt.samples`).

    Each batch runs twice: with the engine's thresholds, and to its end, or in `original` where
    that is the reference. Raises UsageError for an engine without exits or a promise, rows that
    have calibrated, and where `original` or labels are wanted and missing; UnsafeFileError for a
    damaged promise, VerificationError where thresholds or outputs are not those of the promise.
    """
    promise = promise_of(engine)
    if promise.reference == "original" and original is None:
        reason = "the promise is of the loss against the original model"
        raise UsageError(reason, "name that model by --against")
    samples = open_samples(path, engine.signature.needed)
    if promise.rows in samples.hashes():
        reason = f"the rows of {path} have calibrated these exits, so they cannot judge them"
        raise UsageError(reason, "give rows that had no part in making the engine")
    _check_labels(engine.signature, promise, samples)
    other = original if promise.reference == "original" else None
    parts = list(_run(engine, promise, samples, other))
    losses, taken = (np.concatenate(part) for part in zip(*parts, strict=True))
    delta = LEVEL if promise.delta is None else promise.delta
    counts = np.bincount(taken, minlength=len(promise.shares) + 1)[1:]
    return ExitCheck(
        promise,
        path.name,
        samples.count,
        held_out(losses, promise.epsilon, delta),
        _allowed(promise),
        tuple(counts.tolist()),
    )


def promise_of(engine: Engine) -> Promise:
    """Return what an engine promises, checked against its signature."""
    signature, facts = engine.signature, engine.manifest["facts"].get("exits")
    if not has_exits(signature):
        reason = f"{engine.folder} has no exits, so there is no promise to judge by data"
        raise UsageError(reason, "leave --data out, or convert with exit-early in the recipe")
    if facts is None:
        reason = f"the exits of {engine.folder} were not calibrated: they promise nothing"
        raise UsageError(reason, "convert the model again, with calibration data")
    promise = Promise.from_json(facts.get("promise") if isinstance(facts, dict) else None)
    outputs = {spec.name: spec for spec in signature.outputs}
    sizes = outputs[promise.output].shape if promise.output in outputs else ()
    if not _has_answers(promise, sizes) or EXIT_INDEX not in outputs:
        raise UnsafeFileError("the promise of the exits is damaged: its output is not there")
    held = next(spec.default for spec in signature.inputs if spec.name == TAU)
    if held != promise.tau:
        reason = "the thresholds of the engine are not those that the promise was made for"
        raise VerificationError(reason, "write the engine again")
    return promise


def _has_answers(promise: Promise, sizes: Sequence[Size]) -> bool:
    """Tell whether an output of these sizes has what the promise judges."""
    rank, place = len(sizes), promise.position
    if not (rank > 1 if place is None else 0 < place < rank - 1):
        return False
    one = rank == (2 if place is None else 3) and isinstance(sizes[-1], int)
    return one or not LOSSES[promise.loss].labelled


def _check_labels(signature: Signature, promise: Promise, samples: Samples) -> None:
    """Raise UsageError where the loss needs labels that the file does not hold."""
    loss = LOSSES[promise.loss]
    if not loss.labelled:
        return
    if samples.labels is None:
        reason = f"the promise is of the {loss.title}, which needs labels: {samples.path} has none"
        raise UsageError(reason, f"store an array {LABELS!r} [samples] of integers beside the rows")
    spec = next(spec for spec in signature.outputs if spec.name == promise.output)
    check_classes(samples.labels, int(spec.shape[-1]), spec.name)


def _run(
    engine: Engine, promise: Promise, samples: Samples, original: Original | None
) -> Iterator[tuple[Array, Array]]:
    """Yield the losses of each batch, and the exits that its rows take."""
    signature, start = engine.signature, 0
    for batch in samples:
        got = _named(signature, engine.run(bind(signature, (), batch)))
        never = without_exits(signature, batch)
        want = original(batch) if original else _named(signature, engine.run(never))
        taken = got[EXIT_INDEX].reshape(-1)
        if not ((taken >= 1) & (taken <= len(promise.shares))).all():
            raise VerificationError(f"{EXIT_INDEX} names no exit", "build the engine again")
        end = start + len(taken)
        labels = None if samples.labels is None else samples.labels[start:end]
        yield _losses(promise, got, want, labels), taken
        start = end


def _named(signature: Signature, outputs: list[Array]) -> Mapping[str, Array]:
    return {spec.name: array for spec, array in zip(signature.outputs, outputs, strict=True)}


def _losses(
    promise: Promise,
    got: Mapping[str, Array],
    want: Mapping[str, Array],
    labels: Array | None,
) -> Array:
    """Return the loss of each unit: each position of each row, or each row."""
    name, place = promise.output, promise.position
    if name not in want or want[name].shape != got[name].shape:
        reason = f"the original model has no output {name!r} of the shape of the engine's"
        raise VerificationError(reason, "name the model that the folder was made of")
    one, other = (
        side if place is None else side.take(-1, axis=place) for side in (got[name], want[name])
    )
    return losses_of(promise.loss, promise.unit, one, other, labels)


def _allowed(promise: Promise) -> float:
    """Return the loss above which a promise is contradicted.

    crc promises the mean over calibrations, and one of them may be above epsilon. It takes the last
    setting whose mean loss on n rows is at most ((n + 1) epsilon - 1) / n, and so what "ltt-hb"
    would take for another epsilon, the upper bound of that: it holds with probability 1 - LEVEL.
    """
    if promise.delta is not None:
        return promise.epsilon
    rows = max(1, min(promise.samples, _MOST))
    most = max(0.0, ((rows + 1) * promise.epsilon - 1) / rows)
    return max(promise.epsilon, held_out(np.full(rows, most), promise.epsilon, LEVEL).upper)
