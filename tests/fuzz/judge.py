"""Judge one model under some passes: refused with a reason, or right; nothing else will do."""

import re
import traceback
from dataclasses import dataclass, field, fields, replace

import torch

from effopt.errors import EffoptError
from effopt.pipeline import Pass, parse_passes, spec_of
from effopt.program import Program
from effopt.sites import find_tokens
from tests.fuzz.model import Inputs, draw, make
from tests.fuzz.settle import settled
from tests.fuzz.spec import Spec
from tests.oracle.case import captured, make_case
from tests.oracle.checks import faults
from tests.oracle.compare import differ
from tests.oracle.guards import guards, narrowed

PLAIN = "normal form"


@dataclass
class Verdict:
    """What became of one model: by pass, "right", a refusal, or what is wrong."""

    faults: dict[str, list[str]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    right: list[str] = field(default_factory=list)


def judge(spec: Spec, passes: tuple[str, ...]) -> Verdict:
    """Capture a model once and try every pass on it."""
    verdict = Verdict()
    made = _captured(spec, verdict)
    if made is None:
        return verdict
    original, normal = made
    for one in passes:
        _judge_pass(spec, original, normal, one, verdict)
    return verdict


def _captured(spec: Spec, verdict: Verdict) -> tuple[Program, Program] | None:
    model, inputs = make(spec), draw(spec, 2)
    names = ("batch", "length") if spec.free_length else ("batch",)
    try:
        original, normal = captured(model, inputs, names)
    except EffoptError as refusal:
        _refused(PLAIN, refusal, verdict)
        return None
    except Exception:  # noqa: BLE001 - any other exception is what the fuzzer looks for
        verdict.faults[PLAIN] = [_crash()]
        return None
    with torch.no_grad():
        found = model(*inputs)
    flat = torch.utils._pytree.tree_leaves(found)
    wrong = differ(normal.run(inputs), flat, 2e-5)
    if wrong:
        verdict.faults[PLAIN] = [f"differs from the model: {one}" for one in wrong]
    else:
        verdict.right.append(PLAIN)
    return original, normal


def _judge_pass(spec: Spec, original: Program, normal: Program, one: str, verdict: Verdict) -> None:
    before = len(guards(normal))

    def draws(batch: int, length: int | None) -> Inputs:
        return draw(spec, batch, length)

    wrong: list[str] = []
    try:
        for step in parse_passes(one):
            case = make_case(original, normal, spec_of(_along(step, normal, spec)), draws)
            if case.reduced is not normal:
                wrong += faults(case) + narrowed(case, before)
                original = normal = case.reduced
    except EffoptError as refusal:
        _refused(one, refusal, verdict)
        return
    except Exception:  # noqa: BLE001 - any other exception is what the fuzzer looks for
        wrong = [_crash()]
    if wrong:
        verdict.faults[one] = wrong
    else:
        verdict.right.append(one)


def _along(step: Pass, normal: Program, spec: Spec) -> Pass:
    """Set the option `axis` where the model's row says which one."""
    names = [axis.name for axis in normal.get(find_tokens)]
    if spec.axis < 0 or not names:
        return step
    return replace(step, axis=names[spec.axis % len(names)])  # type: ignore[type-var]


def _refused(one: str, refusal: EffoptError, verdict: Verdict) -> None:
    if not refusal.reason or not refusal.remedy or "defect" in refusal.remedy:
        verdict.faults[one] = [f"a refusal without reason or remedy: {refusal!r}"]
    verdict.refusals[one] = f"{type(refusal).__name__}: {refusal.reason}"


def _crash() -> str:
    text = traceback.format_exc().strip().splitlines()
    places = [line.strip() for line in text if line.strip().startswith("File ")]
    return f"crash: {text[-1][:300]} | {' <- '.join(reversed(places[-3:]))}"


def kind(fault: str) -> str:
    """Shorten a fault to its kind: without numbers, names and rows."""
    head = fault.split("|")[0]
    head = re.sub(r"row \d+,? ?|output \d+ ?", "", head)
    return re.sub(r"[\d.e+-]*\d[\d.e+-]*", "#", head)[:90]


def shrunk(spec: Spec, one: str, want: str) -> Spec:
    """Set field after field to its default while the fault stays of its kind."""
    changed = True
    while changed:
        changed = False
        for part in fields(spec):
            for value in _simpler(part.name, getattr(spec, part.name), part.default):
                smaller = settled(replace(spec, **{part.name: value}))
                if smaller != spec and _fails(smaller, one, want):
                    spec, changed = smaller, True
                    break
    return spec


def _simpler(name: str, value: object, default: object) -> list[object]:
    if value == default:
        return []
    if name == "hostile":
        assert isinstance(value, tuple)
        return [(), *[(item,) for item in value if len(value) > 1]]
    if name == "depth":
        assert isinstance(value, int)
        return [*range(1, value)]
    return [default]


def _fails(spec: Spec, one: str, want: str) -> bool:
    found = judge(spec, () if one == PLAIN else (one,)).faults.get(one, [])
    return any(kind(fault) == want for fault in found)


def reproduction(spec: Spec, one: str) -> str:
    """Write a fault as code to run."""
    return "\n".join(
        (
            "from tests.fuzz.judge import judge",
            "from tests.fuzz.spec import Spec",
            f"spec = {spec!r}",
            f"print(judge(spec, ({one!r},)).faults)",
        )
    )
