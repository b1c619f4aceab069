"""Passes and pipelines: what a pass is, and how a list of them runs over a program."""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import (
    Any,
    ClassVar,
    Protocol,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from effopt.errors import PreconditionError, UsageError, unknown
from effopt.program import Program
from effopt.report import StepRecord
from effopt.spec import Item, Value, parse, show
from effopt.verify import verify


@dataclass(frozen=True)
class Outcome:
    """What a pass did: whether the graph changed, notes for people, facts for the report."""

    changed: bool
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Pass(Protocol):
    """One rewrite. A pass is a frozen dataclass: its fields are its options.

    `exact` says whether outputs stay the same to rounding; `normal` that the pass belongs to the
    normal form, which every pipeline begins with.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]

    def check(self, program: Program) -> list[PreconditionError]:
        """Say why the pass cannot run; the program is not touched."""
        ...

    def run(self, program: Program) -> Outcome:
        """Rewrite the program through Edit."""
        ...


@runtime_checkable
class Closing(Protocol):
    """A pass that has a last word: when all steps have run, on the program as it will be built."""

    name: ClassVar[str]

    def finish(self, program: Program, original: Program, record: StepRecord) -> Outcome:
        """Set what depends on all passes; the graph stays as it is.

        `original` is the program as captured, `record` what the pass did when it ran.
        Raises PreconditionError where it cannot keep what the pass stands for.
        """
        ...


@dataclass(frozen=True)
class Step:
    """A pass in a pipeline; an optional one that must refuse is skipped with its reason."""

    run: Pass
    optional: bool = False


def pass_class(name: str) -> type[Any]:
    """Load the class of a pass by its name."""
    from effopt.passes import TABLE

    if name not in TABLE:
        raise unknown("pass", name, TABLE)
    module, _, attribute = TABLE[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found


def make_pass(item: Item) -> Pass:
    """Build a pass from its written form; unknown options and wrong types are UsageErrors."""
    kind = pass_class(item.name)
    options = {option.name: option for option in fields(kind)}
    hints = get_type_hints(kind)
    for key, value in item.options.items():
        if key not in options:
            raise unknown(f"option of {item.name}", key, options)
        _check_type(item.name, key, value, hints[key])
    missing = [
        o.name
        for o in options.values()
        if o.default is MISSING and o.default_factory is MISSING and o.name not in item.options
    ]
    if missing:
        raise UsageError(
            f"{item.name} needs the option {missing[0]!r}",
            f"write {item.name}{{{missing[0]}=...}}",
        )
    made: Pass = kind(**item.options)
    return made


def _check_type(name: str, key: str, value: Value, hint: Any) -> None:
    if not _fits(value, hint):
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        wanted = " or ".join(str(kind) if get_origin(kind) else kind.__name__ for kind in kinds)
        raise UsageError(
            f"option {key!r} of {name} is {show(value)!r}, not of type {wanted}",
            f"see `effopt passes` for the options of {name}",
        )


def _fits(value: Value, hint: Any) -> bool:
    """Tell whether an option's value is of a type, its elements too; a bool is no number."""
    if isinstance(hint, UnionType):
        return any(_fits(value, kind) for kind in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def spec_of(step: Pass) -> str:
    """Write a pass as its spec string: only what differs from the defaults."""
    changed = {
        option.name: getattr(step, option.name)
        for option in fields(step)  # type: ignore[arg-type]
        if getattr(step, option.name) != option.default
    }
    return str(Item(step.name, changed))


def parse_passes(text: str) -> list[Pass]:
    """Read a spec string into passes."""
    return [make_pass(item) for item in parse(text)]


Progress = Callable[[str], None]


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. Each runs on a fork, is verified, and only then kept."""

    steps: Sequence[Step]

    def run(
        self, program: Program, progress: Progress | None = None
    ) -> tuple[Program, tuple[StepRecord, ...]]:
        """Run all steps; a refused step that is not optional raises its PreconditionError."""
        records, forks, first = list[StepRecord](), Forks(), program
        for step in self.steps:
            if progress:
                progress(step.run.name)
            program, record = _run_step(step, program, forks)
            records.append(record)
        program.compile()
        for step, record in zip(self.steps, tuple(records), strict=True):
            if isinstance(step.run, Closing) and record.changed:
                if progress:
                    progress(f"{step.run.name}: last word")
                records.append(_finish(step.run, program, first, record))
        return program, tuple(records)


def _finish(step: Closing, program: Program, original: Program, record: StepRecord) -> StepRecord:
    start, nodes = time.perf_counter(), _nodes(program)
    outcome = step.finish(program, original, record)
    return StepRecord(
        spec=f"{step.name} (finish)",
        changed=outcome.changed,
        notes=outcome.notes,
        nodes_before=nodes,
        nodes_after=nodes,
        seconds=time.perf_counter() - start,
        facts=dict(outcome.facts),
    )


def _run_step(step: Step, program: Program, forks: "Forks") -> tuple[Program, StepRecord]:
    start = time.perf_counter()
    before = _nodes(program)
    refusals = step.run.check(program)
    outcome, after = Outcome(False), program
    if not refusals:
        try:
            outcome, after = _on_fork(step.run, program, forks)
        except PreconditionError as refusal:  # found while rewriting: the fork is dropped
            refusals = [refusal]
    if refusals and not step.optional:
        raise refusals[0]
    return after, StepRecord(
        spec=spec_of(step.run),
        changed=outcome.changed,
        skipped=_one_line(refusals[0]) if refusals else "",
        notes=outcome.notes,
        nodes_before=before,
        nodes_after=_nodes(after),
        seconds=time.perf_counter() - start,
        facts=dict(outcome.facts),
    )


@dataclass
class Forks:
    """Gives forks, first the one that the last pass left as it was: to copy a graph costs time."""

    spare: Program | None = None

    def take(self, program: Program) -> Program:
        """Return a fork of the program that the step before returned."""
        fork, self.spare = self.spare or program.fork(), None
        return fork


def _one_line(refusal: PreconditionError) -> str:
    return f"{refusal.node}: {refusal.reason} (remedy: {refusal.remedy})"


def _on_fork(step: Pass, program: Program, forks: "Forks") -> tuple[Outcome, Program]:
    """Run a pass on a fork and verify it; return the program itself if nothing changed."""
    fork = forks.take(program)
    outcome = step.run(fork)
    if not outcome.changed:
        forks.spare = fork
        return outcome, program
    if program.promise is not None:
        reason = "its exits are calibrated, and the promise holds for the graph as it is"
        remedy = "put this pass and exit-early in one recipe: calibration comes last by itself"
        raise PreconditionError("model", reason, remedy)
    fork.history = (*program.history, spec_of(step))
    verify(fork, step.name)
    return outcome, fork


def _nodes(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.nodes())
