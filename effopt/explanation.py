"""explain: what can be done to a model, where, and why not."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import nn
from torch.export import ExportedProgram

from effopt import explain_rows as rows
from effopt.capture import capture
from effopt.cost import node_count
from effopt.errors import EffoptError
from effopt.explain_records import (
    AxisRow,
    CallRow,
    ExitRow,
    GroupRow,
    InputRow,
    Refusal,
    UnknownRow,
)
from effopt.pipeline import Pipeline, Progress
from effopt.program import Program, is_tensor
from effopt.recipe import steps_of

T = TypeVar("T")


@dataclass(frozen=True)
class Explanation:
    """What effopt found in a model, in its normal form.

    `attention` counts the attention calls. `refused` says which steps of the normal form, and
    which parts of this answer, were left out.
    """

    model: str
    parameters: int
    operators: int
    attention: int
    inputs: tuple[InputRow, ...]
    axes: tuple[AxisRow, ...]
    calls: tuple[CallRow, ...]
    exits: tuple[ExitRow, ...]
    groups: tuple[GroupRow, ...]
    unknown: tuple[UnknownRow, ...]
    refused: tuple[Refusal, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        record: dict[str, Any] = asdict(self)
        return record

    def text(self, width: int = 80) -> str:
        """Return tables of at most `width` columns."""
        from effopt.explain_text import render

        return render(self, width)

    def svg(self) -> str:
        """Return a picture of the blocks on each token axis: one SVG file."""
        from effopt.explain_svg import render

        return render(self)


def explain(
    model: nn.Module | ExportedProgram,
    example_inputs: object = None,
    *,
    dynamic: Sequence[str] = ("batch",),
    seed: int = 0,
    progress: Progress | None = None,
) -> Explanation:
    """Capture a model, bring it to its normal form, and say what can be done to it.

    Arguments as in `effopt.optimize`; raises UsageError and CaptureError as it does. Whatever can
    be captured is explained: what fails then is told in `Explanation.refused`.
    """
    tell = progress or (lambda stage: None)
    tell("capture")
    captured = capture(model, example_inputs, dynamic=dynamic, seed=seed)
    asked = _Questions(captured, tell)
    return Explanation(
        model=type(model).__name__,
        parameters=_parameters(captured),
        operators=node_count(asked.program),
        inputs=rows.input_rows(captured),
        axes=asked.about("token axes", rows.axis_rows),
        calls=(calls := asked.about("attention calls", rows.call_rows)),
        attention=len(calls),
        exits=asked.about("exits", rows.exit_rows),
        groups=asked.about("groups", rows.group_rows),
        unknown=asked.about("unknown operators", rows.unknown_rows),
        refused=tuple(asked.refused),
    )


class _Questions:
    """Questions about one program; one that cannot be answered leaves a refusal."""

    def __init__(self, captured: Program, tell: Callable[[str], None]) -> None:
        self.program = captured
        self.refused: list[Refusal] = []
        self._tell = tell
        for step in steps_of("exact"):
            tell(step.run.name)
            found = self._ask(step.run.name, Pipeline([step]).run)
            self.program = self.program if found is None else found[0]

    def about(self, subject: str, find: Callable[[Program], tuple[T, ...]]) -> tuple[T, ...]:
        """Return the rows on a subject, none where they cannot be found."""
        self._tell(subject)
        return self._ask(subject, find) or ()

    def _ask(self, work: str, find: Callable[[Program], T]) -> T | None:
        try:
            return find(self.program)
        except EffoptError as error:
            refusal = Refusal.of(error)
        except Exception as error:  # noqa: BLE001 - an answer with a gap is better than none
            refusal = rows.defect(work, error)
        self.refused.append(refusal)
        return None


def _parameters(program: Program) -> int:
    """Count the numbers that were learned; shared ones once."""
    weights = [program.weight(n) for n in program.nodes() if n.op == "get_attr" and is_tensor(n)]
    learned = {id(held): held.numel() for held in weights if isinstance(held, nn.Parameter)}
    return sum(learned.values())
