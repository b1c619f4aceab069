"""One model of the zoo on trial: captured, in normal form, reduced, and judged by the oracle."""

import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace

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

REDUCED, REFUSED, WRONG, CRASH = "reduced", "refused", "wrong", "crash"
TOO_MANY = "is more than half of"
ULPS = 32
"""Between normal form and model, of the largest value: 14.7 were measured (TimeSformer)."""


@dataclass(frozen=True)
class Verdict:
    """What became of one pass on one axis: reduced, refused, wrong, or crash; and why."""

    kind: str
    reason: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        return self.reason or self.kind


@dataclass(frozen=True)
class AxisTrial:
    """What each pass did on one token axis; `sites` counts the usable ones."""

    axis: str
    passes: dict[str, Verdict]
    tokens: int = 0
    sites: int = 0


@dataclass(frozen=True)
class Trial:
    """What became of one model: by axis, that with most sites first.

    `batch` is free, or fixed by the model; `ulps` is the distance of its normal form from it.
    """

    model: str
    axes: tuple[AxisTrial, ...]
    batch: str = "free"
    ulps: float = 0.0
    seconds: float = 0.0

    @property
    def family(self) -> str:
        """Return the part of the zoo that the model stands in."""
        return ARCHITECTURES[self.model].family

    @property
    def decisive(self) -> Verdict:
        """Return what decides: a crash or a wrong result if there is one, else any success."""
        order = (CRASH, WRONG, REDUCED, REFUSED)
        found = [verdict for axis in self.axes for verdict in axis.passes.values()]
        return min(found, key=lambda verdict: order.index(verdict.kind))


def judge(name: str) -> Trial:
    """Capture a model of the zoo and try every token pass on each of its axes."""
    start = time.perf_counter()
    trial = Trial(name, ())
    try:
        trial = _judged(trial)
    except Exception as error:  # noqa: BLE001 - a crash is what the zoo looks for
        trial = _everywhere(trial, _verdict_of(error))
    return replace(trial, seconds=round(time.perf_counter() - start, 1))


def _everywhere(trial: Trial, verdict: Verdict) -> Trial:
    return replace(trial, axes=(AxisTrial("", dict.fromkeys(PASSES, verdict)),))


def _judged(trial: Trial) -> Trial:
    model, given = ARCHITECTURES[trial.model].make()
    try:
        original, normal = captured(model, given)
    except CaptureError as refusal:
        if "'batch'" not in refusal.remedy:
            raise
        original, normal = captured(model, given, dynamic=())
        trial = replace(trial, batch="fixed")
    ulps = distance(normal, model, given)
    trial = replace(trial, ulps=round(ulps, 1))
    if not ulps <= ULPS:
        return _everywhere(trial, Verdict(WRONG, f"the normal form is {ulps:.3g} ulps away"))
    found = sorted(normal.get(find_tokens), key=lambda axis: -len(axis.usable()))
    if not found:
        tried = {name: _tried(original, normal, name, None) for name in PASSES}
        return replace(trial, axes=(AxisTrial("", tried),))
    return replace(trial, axes=tuple(_axis_trials(original, normal, found)))


def _axis_trials(original: Program, normal: Program, found: list[TokenAxis]) -> Iterator[AxisTrial]:
    for axis in found:
        tried = {name: _tried(original, normal, name, axis) for name in PASSES}
        tokens = axis.size if isinstance(axis.size, int) else 0
        yield AxisTrial(axis.name, tried, tokens, len(axis.usable()))


def distance(program: Program, model: nn.Module, given: Given) -> float:
    """Return how far outputs are from the model's, in ulps of the largest value of each."""
    with as_deployed(model):
        want = [leaf for leaf in pytree.tree_leaves(model(**given)) if isinstance(leaf, Tensor)]
    got = program.run(program.flatten((), dict(given)))
    return max(_ulps(a, b) for a, b in zip(got, want, strict=True))


def _ulps(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if torch.equal(got, want):
        return 0.0
    finite = want.isfinite()
    if not want.is_floating_point() or not torch.equal(got.isfinite(), finite):
        return float("inf")
    got, want = got[finite], want[finite]
    scale = want.abs().max().item() * torch.finfo(want.dtype).eps
    return float((got - want).abs().max().item() / scale) if scale else float("inf")


def _tried(original: Program, normal: Program, name: str, axis: TokenAxis | None) -> Verdict:
    verdict = Verdict(CRASH, "no spelling was tried")
    for spec in PASSES[name]:
        if axis is not None:
            spec = spec.replace("}", f",axis={axis.name}}}")
        verdict = _verdict(original, normal, spec, axis)
        if TOO_MANY not in verdict.reason:
            break
    return verdict


def _verdict(original: Program, normal: Program, spec: str, axis: TokenAxis | None) -> Verdict:
    try:
        reduced, records = Pipeline([Step(one) for one in parse_passes(spec)]).run(normal)
        if not records[-1].changed:
            reason = f"nothing leaves ({'; '.join(records[-1].notes)})"
            return Verdict(REFUSED, reason, "ask for more tokens to leave")
        assert axis is not None
        draw, padding = redraw(original), mask_input(original)
        wrong = faults(Case(original, normal, reduced, axis, draw, padding))
    except Exception as error:  # noqa: BLE001 - a crash is what the zoo looks for
        return _verdict_of(error)
    return Verdict(WRONG, stable("; ".join(wrong))) if wrong else Verdict(REDUCED)


def _verdict_of(error: Exception) -> Verdict:
    """Tell a refusal, which has a reason and a remedy, from a crash."""
    if isinstance(error, VerificationError):
        return Verdict(WRONG, stable(error.reason), stable(error.remedy))
    if isinstance(error, EffoptError):
        return Verdict(REFUSED, stable(error.reason), stable(error.remedy))
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in frames[-3:]]
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return Verdict(CRASH, f"{text[:300]} ({' > '.join(places)})")


_UNSTABLE = (
    (r"(?:[^\s()'\"]*/)?([\w.-]+\.py):\d+", r"\1"),
    (r" \(unhinted:.*", ""),
    (r"\b([a-z]\w*?)_\d+\b", r"\1"),
    (r"\b[su]\d+\b", "s"),
    (r"\s+", " "),
)
"""What differs by machine or by numbering: folders, lines, and numbers of nodes and sizes."""


def stable(text: str) -> str:
    """Leave out what a change elsewhere would change."""
    for pattern, instead in _UNSTABLE:
        text = re.sub(pattern, instead, text)
    return text.strip()
