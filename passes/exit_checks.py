"""What must hold of options and data before exits are fitted."""

from typing import TYPE_CHECKING

from effopt.errors import PreconditionError
from effopt.passes.exit_fit import FIT, marks
from effopt.passes.exit_labels import check_labels
from effopt.passes.exit_plan import Plan
from effopt.program import Program, shape, where
from effopt.risk import least_samples
from effopt.signature import TAU

if TYPE_CHECKING:
    from effopt.passes.exit_early import ExitEarly


def check_options(program: Program, plan: Plan, asked: "ExitEarly", form: str) -> None:
    """Raise PreconditionError where options do not meet the plan, or what data there are."""
    first = where(plan.streams[0].node)
    if program.calibration is None:
        reason = "exits are fitted to data and calibrated on it, and there is none"
        raise PreconditionError("model", reason, "pass calibration=, or --calibration FILE")
    widths = {plan.reads.features(stream) for stream in plan.streams}
    if asked.shared and len(widths) > 1:
        reason = f"exits of {len(widths)} widths cannot share a head"
        raise PreconditionError(first, reason, "leave shared out")
    if asked.polish and plan.reads.is_lens:
        reason = "polish trains ridge heads, and outputs have tokens, which a lens serves"
        raise PreconditionError(first, reason, "leave polish out")
    if asked.fit == "labels" and plan.reads.is_lens:
        reason = "labels fit ridge heads, and outputs have tokens, which a lens serves"
        raise PreconditionError(first, reason, "leave fit out")
    if asked.labelled:
        check_labels(program, plan, asked.labelled)
    _check_form(program, form)
    _check_loss(program, plan, asked.loss)


def _check_form(program: Program, form: str) -> None:
    if any(spec.name == TAU for spec in program.signature.inputs):
        reason = f"the model has an input {TAU!r}, which is the name of the thresholds"
        raise PreconditionError("model", reason, "rename the argument of the model's forward")
    if form != "if" and "batch" not in program.ranges:
        reason = f"lower={form} lets rows leave the batch, which is fixed"
        raise PreconditionError("model", reason, "leave 'batch' in dynamic, or give lower=if")


def _check_loss(program: Program, plan: Plan, loss: str) -> None:
    """Refuse a loss that says nothing of the output that is judged."""
    sizes = shape(plan.answers[plan.scored])
    several = len(sizes) > 1 and isinstance(sizes[-1], int) and sizes[-1] > 1
    if not several:
        reason = f"loss={loss} compares several numbers a row, and {plan.scored!r} has one"
        remedy = "let the model return the scores of its classes, or an embedding"
        raise PreconditionError(where(plan.answers[plan.scored]), reason, remedy)


def check_samples(program: Program, plan: Plan, asked: "ExitEarly") -> None:
    """Raise PreconditionError where there are too few samples to fit or to calibrate."""
    data = program.calibration
    assert data is not None, "checked"
    # With as many samples as features, and the penalty chosen, 192 features of a network on
    # digits agreed with it on .994 of others; with half as many .989, with twice .996.
    marked = marks(data.samples, asked.share)
    wanted = max(plan.reads.features(stream) for stream in plan.streams)
    fits, left = int((marked == FIT).sum()), int((marked == 0).sum())
    if not plan.reads.is_lens and fits < wanted:
        reason = (
            f"a head of {wanted} features wants as many samples to fit, and of the "
            f"{data.samples} of the calibration data {fits} fit"
        )
        remedy = "give more samples, raise share, or read less (pool=first or mean)"
        raise PreconditionError(where(plan.streams[0].node), reason, remedy)
    least = least_samples(asked.rule, asked.epsilon, asked.level)
    if left < least:
        reason = (
            f"{asked.rule} with epsilon={asked.epsilon:g} needs {least} samples to calibrate, "
            f"and of the {data.samples} of the calibration data {left} are left for it"
        )
        remedy = "give more samples, lower share, or allow a larger epsilon"
        raise PreconditionError("model", reason, remedy)
