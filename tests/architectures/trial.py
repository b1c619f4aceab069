"""One model of the zoo on trial: captured, in normal form, reduced, and judged by the oracle."""

import re
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effopt.errors import CaptureError, EffoptError, VerificationError
from effopt.pipeline import Pipeline, Step, parse_passes
from effopt.program import Program
from effopt.sites import TokenAxis, find_tokens
from effopt.tracing import as_deployed
from tests.architectures import ARCHITECTURES
from tests.architectures.base import Given
from tests.oracle import Case, faults
from tests.oracle.case import captured, mask_input, redraw

PASSES = {
    "merge-tokens": ("merge-tokens{r=2}", "merge-tokens{r=1}"),
    "prune-tokens": ("prune-tokens{keep=0.7,sites=[0.0]}",),
}
"""Each token pass as it is tried; the next spelling where the first takes too many tokens."""

REDUCED = "reduced"
ULPS = 256
"""Normal form against the model, of the largest value: float32 through a few blocks."""


@dataclass(frozen=True)
class Verdict:
    """What became of one pass on one axis: reduced, refused, wrong, or crash."""

    kind: str
    reason: str = ""
    remedy: str = ""

    @property
    def pinned(self) -> str:
        """The kind, or why the pass was refused: what a test compares."""
        return self.kind if self.kind == REDUCED else self.reason


@dataclass(frozen=True)
class Trial:
    """What became of one model; `ulps` is the distance of its normal form from it."""

    model: str
    family: str
    passes: dict[str, Verdict]
    axes: dict[str, dict[str, Verdict]] = field(default_factory=dict)
    tokens: int = 0
    sites: int = 0
    batch: str = "free"
    ulps: float = 0.0
    seconds: float = 0.0

    @property
    def outcome(self) -> str:
        """The worst verdict if one is no verdict, else whether some pass reduced the model."""
        kinds = {verdict.kind for verdict in self._all()}
        return next(kind for kind in ("crash", "wrong", REDUCED, "refused") if kind in kinds)

    @property
    def cause(self) -> Verdict:
        """The verdict that decided the outcome."""
        return next(verdict for verdict in self._all() if verdict.kind == self.outcome)

    def _all(self) -> list[Verdict]:
        rows = (self.passes, *self.axes.values())
        return [verdict for row in rows for verdict in row.values()]


def judge(name: str) -> Trial:
    """Capture a model of the zoo and try every token pass on it."""
    start = time.perf_counter()
    row = ARCHITECTURES[name]
    trial = Trial(name, row.family, {})
    try:
        trial = _judged(trial)
    except CaptureError as refusal:
        trial = _everywhere(trial, _refused(refusal))
    except Exception as error:  # noqa: BLE001 - any other exception is what the zoo looks for
        trial = _everywhere(trial, _crashed(error))
    return replace(trial, seconds=round(time.perf_counter() - start, 1))


def _everywhere(trial: Trial, verdict: Verdict) -> Trial:
    return replace(trial, passes=dict.fromkeys(PASSES, verdict))


def _judged(trial: Trial) -> Trial:
    model, given = ARCHITECTURES[trial.model].make()
    try:
        original, normal = captured(model, given)
    except CaptureError:
        original, normal = captured(model, given, dynamic=())
        trial = replace(trial, batch="fixed")
    ulps = distance(normal, model, given)
    trial = replace(trial, ulps=round(ulps, 1))
    if not ulps <= ULPS:
        return _everywhere(trial, Verdict("wrong", f"the normal form is {ulps:.3g} ulps away"))
    found = find_tokens(normal)
    main = max(found, key=lambda axis: len(axis.usable()), default=None)
    trial = replace(
        trial,
        passes={name: _tried(original, normal, name, main) for name in PASSES},
        axes={
            axis.name: {name: _tried(original, normal, name, axis, axis.name) for name in PASSES}
            for axis in found
            if axis is not main
        },
    )
    if main is None:
        return trial
    return replace(trial, tokens=int(main.size), sites=len(main.usable()))


def distance(program: Program, model: nn.Module, given: Given) -> float:
    """Return how far outputs are from the model's, in ulps of the largest value of each."""
    with as_deployed(model):
        want = [leaf for leaf in pytree.tree_leaves(model(**given)) if isinstance(leaf, Tensor)]
    got = program.run(program.flatten((), dict(given)))
    return max(_ulps(a, b) for a, b in zip(got, want, strict=True))


def _ulps(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not want.numel() or torch.equal(got, want):
        return 0.0
    if not want.is_floating_point():
        return float("inf")
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return float("inf")
    got, want = got[finite], want[finite]
    scale = want.abs().max().item() * torch.finfo(want.dtype).eps
    return float((got - want).abs().max().item() / scale) if scale else float("inf")


def _tried(
    original: Program, normal: Program, name: str, axis: TokenAxis | None, named: str = ""
) -> Verdict:
    verdict = Verdict("crash", "no spelling was tried")
    for spec in PASSES[name]:
        verdict = _verdict(original, normal, _on(spec, named), axis)
        if "more than half" not in verdict.reason:
            break
    return verdict


def _on(spec: str, axis: str) -> str:
    return spec.replace("}", f",axis={axis}}}") if axis else spec


def _verdict(original: Program, normal: Program, spec: str, axis: TokenAxis | None) -> Verdict:
    try:
        reduced, records = Pipeline([Step(one) for one in parse_passes(spec)]).run(normal)
        if not records[-1].changed:
            return Verdict("refused", "nothing leaves: " + "; ".join(records[-1].notes), "")
        assert axis is not None
        draw, padding = redraw(original), mask_input(original)
        wrong = faults(Case(original, normal, reduced, axis, draw, padding))
    except VerificationError as error:
        return Verdict("wrong", stable(str(error)))
    except EffoptError as refusal:
        return _refused(refusal)
    except Exception as error:  # noqa: BLE001 - any other exception is what the zoo looks for
        return _crashed(error)
    return Verdict("wrong", stable("; ".join(wrong))) if wrong else Verdict(REDUCED)


def _refused(refusal: EffoptError) -> Verdict:
    return Verdict("refused", stable(refusal.reason), stable(refusal.remedy))


def _crashed(error: Exception) -> Verdict:
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in frames[-3:]]
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return Verdict("crash", f"{text[:300]} ({' > '.join(places)})")


def stable(text: str) -> str:
    """Leave out what differs by machine: folders and lines of source files."""
    return re.sub(r"(?:[^\s()'\"]*/)?([\w.-]+\.py):\d+", r"\1", text)


def summary(trials: Sequence[Trial]) -> dict[str, int]:
    """Count the outcomes."""
    kinds = [trial.outcome for trial in trials]
    return {kind: kinds.count(kind) for kind in (REDUCED, "refused", "wrong", "crash")}
