"""Calibrating exits: thresholds that keep a promise, found on the engine as it will be built.

Rules and their sources are in `effopt.risk`. Rows that have fitted heads choose the grid of
thresholds too; the others alone are counted.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from torch import Tensor

from effopt.axis_rules import argument
from effopt.backend import Array, as_array, backend
from effopt.errors import PreconditionError, UsageError
from effopt.exit_costs import costs
from effopt.exit_losses import any_exit_losses, exits_taken, grid
from effopt.exits import find_exits, probe, set_thresholds
from effopt.fingerprint import fingerprint
from effopt.kernel import kernel
from effopt.losses import LOSSES, losses_of
from effopt.passes.exit_rows import Order, fit_rows, with_batches
from effopt.program import Program
from effopt.promise import Promise
from effopt.risk import Choice, Curve, choose, curve, require_samples
from effopt.risk_rules import RULES
from effopt.segments import row_places, segments

GUARD = 1e-4
"""What is added to a threshold, of its size: a batch of another size gives other last digits."""

MOST: Mapping[str, float] = MappingProxyType(
    {"max": 1.0, "probability-margin": 1.0, "entropy": 1.0, "saturation": 1.0}
)
"""The largest score there can be, by kind: above it a threshold would stop every row."""

WHOLE = "patience"
"""The kind of score that is a count, and has no last digits."""

STEPS = 500
"""Thresholds that are tried; in order, so that more of them cost no confidence."""

Run = Callable[[tuple[Tensor, ...]], list[Array]]


@dataclass(frozen=True)
class Wish:
    """What a user wants of exits; see the options of exit-early.

    `output` is the one that is judged, and `position` its dimension of tokens where the last of
    them counts alone.
    """

    rule: str
    epsilon: float
    delta: float
    loss: str
    reference: str
    unit: str
    share: float
    score: str
    output: str
    position: int | None

    @property
    def level(self) -> float | None:
        """Return delta, or None for a rule that has none."""
        return self.delta if RULES[self.rule].test else None


def calibrate(program: Program, original: Program, wish: Wish, order: str) -> Promise:
    """Set the thresholds of a program with exits, and return what holds with them.

    The program is lowered for its target and run on the calibration data, without leaving early.
    `order` is the hash of that data as heads were fitted on it. Raises PreconditionError where the
    data came otherwise now, where there are too few samples, or where no threshold can keep the
    promise, as with the original as its reference and an engine that differs more by itself.
    """
    data = program.calibration
    assert data is not None, "exit-early refuses without calibration"
    _check_segments(program)
    marks = fit_rows(data.samples, wish.share)
    with tempfile.TemporaryDirectory(prefix="effopt-") as scratch:
        run, engine = _engine(probe(program, wish.output), Path(scratch))
        seen = _observe(program, original, wish, run, marks)
    if seen.order != order:
        reason = "the calibration data is not, or not in the order, that heads were fitted on"
        remedy = "do not shuffle it: a sample that fits a head must not calibrate a threshold"
        raise PreconditionError("model", reason, remedy)
    found = _choose(wish, seen)
    set_thresholds(program, found.tau)
    return _promise(program, wish, seen, found, engine)


def _check_segments(program: Program) -> None:
    """Raise PreconditionError where the exits cannot be lowered, ahead of the work."""
    exits = program.get(find_exits)
    assert exits is not None, "a program with exits"
    parts = segments(program)
    if exits.form != "if":
        row_places(parts)


@dataclass(frozen=True)
class _Found:
    """What a rule chose: guarded thresholds, of a path [K+1, E] with losses [n, K+1] along it."""

    choice: Choice
    tau: tuple[float, ...]
    path: Array
    table: Array
    curve: Curve


def _choose(wish: Wish, seen: "_Seen") -> _Found:
    """Choose thresholds by the rule; PreconditionError where none can keep the promise."""
    rule = wish.rule if seen.whole else RULES[wish.rule].fractional or wish.rule
    try:
        require_samples(len(seen.scores), rule, wish.epsilon, wish.level)
        path = grid(seen.fitted, STEPS)
        table = any_exit_losses(seen.scores, seen.losses, path, seen.base)
        choice = choose(table, rule, wish.epsilon, wish.level)
        bounds = curve(table, rule, wish.level)
    except UsageError as error:
        raise PreconditionError("model", error.reason, error.remedy) from error
    tau = tuple(_guarded(path[choice.index], wish.score).tolist())
    return _Found(choice, tau, path, table, bounds)


def _promise(program: Program, wish: Wish, seen: "_Seen", found: _Found, engine: str) -> Promise:
    taken = exits_taken(seen.rows, np.array(found.tau, np.float32))
    shares = np.bincount(taken, minlength=len(found.tau) + 2)[1:] / len(taken)
    return Promise(
        rule=found.choice.rule,
        epsilon=wish.epsilon,
        delta=wish.level,
        loss=wish.loss,
        reference=wish.reference,
        unit=wish.unit,
        output=wish.output,
        position=wish.position,
        samples=found.choice.samples,
        fitted=len(seen.fitted),
        rows=seen.order,
        engine=engine,
        graph=fingerprint(program),
        tau=found.tau,
        index=found.choice.index,
        risk=float(found.table[:, found.choice.index].mean()),
        shares=tuple(shares.tolist()),
        cost=float(np.dot(shares, costs(program))),
        grid=tuple(tuple(row) for row in found.path.tolist()),
        risks=found.curve.risk,
        bounds=found.curve.upper,
    )


def said(promise: Promise, program: Program) -> tuple[str, ...]:
    """Say what came out, for people."""
    if not promise.exits:
        return (f"no row may leave: no threshold keeps {promise.words()}",)
    early = 1 - promise.shares[-1]
    gains = f"{early:.1%} of samples leave early; a sample costs {promise.cost:.2f} of the model"
    notes = [_SHARED] if _share_ranges(program) else []
    if program.target is not None and program.target.gpu:
        notes.append(f"calibrated with {promise.engine}: calibrate again on the device")
    return (promise.words(), gains, *notes)


_SHARED = (
    "rows of a batch share the ranges of 8-bit activations, so that scores depend on the batch: "
    "calibrate in batches as they will come, or quantize with activations=row"
)


def _share_ranges(program: Program) -> bool:
    """Tell whether a layer rounds the activations of all rows together, at run time."""
    operator = kernel("quantized_linear").op
    layers = (node for node in program.nodes() if node.target is operator)
    return any(argument(node, "activations") == "tensor" for node in layers)


def _guarded(limits: Array, score: str) -> Array:
    """Raise thresholds a little, which lets fewer rows leave."""
    if score == WHOLE:
        return limits.astype(np.float32)
    raised = limits + GUARD * np.maximum(np.abs(limits), 1e-2)
    most = np.maximum(limits, MOST.get(score, np.inf))
    return np.where(np.isinf(limits), limits, np.minimum(raised, most)).astype(np.float32)


# --- observing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """Scores [n, E] of units, their losses [n, E], and `base` [n] of the end, by the reference.

    `rows` [r, E] are the scores of samples, each once; `fitted` those of the samples that fit.
    `order` is the hash of all samples as they came. Losses are 0 and 1 alone where they are
    `whole`: by what they are, not by those that happen to be there.
    """

    scores: Array
    losses: Array
    base: Array
    rows: Array
    fitted: Array
    order: str
    whole: bool


def _observe(program: Program, original: Program, wish: Wish, run: Run, marks: Tensor) -> _Seen:
    data, order = program.calibration, Order()
    assert data is not None
    scores, losses, base, rows, fitted = (list[Array]() for _ in range(5))
    for batch, numbers in with_batches(data, order):
        outputs = run(batch)
        count = len(outputs) // 2
        found = np.stack(outputs[:count], axis=1)
        fit = marks[numbers].numpy()
        fitted.append(found[fit])
        if fit.all():
            continue
        *answers, end = (_judged(answer, wish) for answer in outputs[count:])
        want = end if wish.reference == "self" else _judged(_original(original, batch, wish), wish)
        labels = None if data.labels is None else data.labels[numbers].numpy()[~fit]
        *each, never = (
            losses_of(wish.loss, wish.unit, answer[~fit], want[~fit], labels)
            for answer in (*answers, end)
        )
        kept = found[~fit]
        rows.append(kept)
        scores.append(np.repeat(kept, len(never) // len(kept), axis=0))
        losses.append(np.stack(each, axis=-1))
        base.append(never)
    parts = (scores, losses, base, rows, fitted)
    one, two, three, four, five = (np.concatenate(part) for part in parts)
    whole = LOSSES[wish.loss].whole and (wish.unit == "token" or end.ndim == 2)
    return _Seen(one, two, three, four, five, order.digest(), whole)


def _judged(answer: Array, wish: Wish) -> Array:
    return answer if wish.position is None else answer.take(-1, axis=wish.position)


def _original(original: Program, batch: tuple[Tensor, ...], wish: Wish) -> Array:
    names = [spec.name for spec in original.signature.outputs]
    return as_array(original.run(batch)[names.index(wish.output)].float())


def _engine(program: Program, folder: Path) -> tuple[Run, str]:
    """Build and open the engine of a program; eager torch where its runtime is not installed."""
    target = program.target
    vendor = backend(target.backend) if target else backend("eager")
    if target is None or not vendor.available().ok:
        return lambda batch: [as_array(x.float()) for x in program.run(batch)], "eager torch"
    built = vendor.build(program, target, folder)
    runner = vendor.load(folder, program.signature.with_ports(built.ports), built.facts)
    engine = "onnxruntime on a CPU" if target.gpu else f"{vendor.name} on {target.name}"
    return lambda batch: runner.run([as_array(x) for x in batch]), engine
