"""Labels of calibration data, where an option of exit-early needs them."""

from effopt.class_labels import check_classes
from effopt.errors import PreconditionError, UsageError
from effopt.passes.exit_plan import Plan
from effopt.program import Program, shape, where


def check_labels(program: Program, plan: Plan, options: str) -> None:
    """Raise PreconditionError where `options` need labels that do not meet the output judged.

    That has to be scores of classes [samples, C], by itself or at its last token.
    """
    data, end = program.calibration, plan.answers[plan.scored]
    if data is None or data.labels is None:
        reason = f"labels are needed for {options}, and the calibration data has none"
        remedy = "pass labels=, or store an array 'labels' beside the inputs in the file"
        raise PreconditionError("model", reason, remedy)
    classes, rank = shape(end)[-1], len(shape(end)) - (plan.position is not None)
    if rank != 2 or not isinstance(classes, int) or classes < 2:
        spec = next(spec for spec in program.signature.outputs if spec.name == plan.scored)
        sizes = ", ".join(map(str, spec.shape))
        reason = f"labels are of scores [samples, classes], and output {plan.scored!r} is [{sizes}]"
        raise PreconditionError(where(end), reason, f"leave {options} out")
    try:
        check_classes(data.labels.numpy(), classes, plan.scored)
    except UsageError as error:
        raise PreconditionError("model", error.reason, error.remedy) from error
