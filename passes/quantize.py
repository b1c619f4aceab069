"""quantize: linear layers on integer weights, by any scheme of `effopt.passes.schemes`.

Channel scales are chosen and folded in float first, which changes nothing; then weights are
rounded. Sources: AWQ (arXiv 2306.00978), SmoothQuant (2211.10438), GPTQ (2210.17323).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.fx import Node

from effopt.edit import Edit
from effopt.errors import PreconditionError, UsageError, unknown
from effopt.passes.channel_scales import fold_scales
from effopt.passes.layer_rounding import Known, quantize_layer
from effopt.passes.layer_statistics import LayerStatistics, by_weight, observe, static_ranges
from effopt.passes.observers import OBSERVERS
from effopt.passes.quantizable import layers_of
from effopt.passes.quantization_plan import Plan, refused_by
from effopt.passes.rounding import Grid
from effopt.passes.schemes import SCHEMES
from effopt.passes.sensitivity import most_sensitive
from effopt.pipeline import Outcome
from effopt.program import Program

LEAST_BLOCK = 16
"""The smallest block that engines take."""

NO_RANGE = (1.0, 0)
"""Step and origin of activations whose range is not fixed beforehand."""


@dataclass(frozen=True)
class Quantize:
    """Put linear layers on integer weights, as a scheme says; other layers stay in float."""

    name: ClassVar[str] = "quantize"
    exact: ClassVar[bool] = False

    scheme: str = field(metadata={"help": f"one of {', '.join(SCHEMES)}"})
    group: int = field(
        default=-1,
        metadata={"help": "weights of a row that share a scale; 0: all; -1: the scheme's"},
    )
    symmetric: str | bool = field(
        default="auto", metadata={"help": "codes around 0; auto: unless the target takes both"}
    )
    clip: bool = field(default=True, metadata={"help": "search where to clip weights (int4-awq)"})
    keep_float: int = field(
        default=0, metadata={"help": "so many of the most sensitive layers stay in float"}
    )
    activations: str = field(
        default="auto", metadata={"help": "what shares a range: row or tensor (int8-dynamic)"}
    )
    alpha: float = field(
        default=0.5, metadata={"help": "share of outliers that goes into int8 weights; 0: none"}
    )
    observer: str = field(default="minmax", metadata={"help": "range of int8-static activations"})
    least: int = field(default=64, metadata={"help": "layers of fewer channels stay in float"})
    heads: bool = field(default=False, metadata={"help": "quantize the last layers too"})

    def __post_init__(self) -> None:
        for name, known in (
            ("scheme", SCHEMES),
            ("activations", ("auto", "row", "tensor")),
            ("observer", OBSERVERS),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if self.symmetric not in ("auto", True, False):
            raise UsageError(f"symmetric is {self.symmetric!r}", "write auto, true or false")
        if self.group < -1:
            raise UsageError(f"group is {self.group}", "give 0, a power of 2, or leave it out")
        if self.keep_float < 0 or self.least < 1 or not 0 <= self.alpha <= 1:
            given = f"keep-float={self.keep_float}, least={self.least}, alpha={self.alpha}"
            raise UsageError(given, "give keep-float from 0, least from 1, alpha from 0 to 1")
        if 0 < self.group < LEAST_BLOCK:
            raise UsageError(
                f"group is {self.group}", f"give 0, or a power of 2 from {LEAST_BLOCK}"
            )
        integers = SCHEMES[self.scheme].activations != "float"
        if integers and self.symmetric is False:
            reason = f"{self.scheme} multiplies integer activations by weights around 0 alone"
            raise UsageError(reason, "leave symmetric out")
        if integers and self.group > 0:
            reason = f"{self.scheme} has one scale a row of weights, not one for {self.group}"
            raise UsageError(reason, "leave group out, or choose int8-weight")
        if self.activations != "auto" and self.scheme != "int8-dynamic":
            reason = f"{self.scheme} does not choose ranges of activations at run time"
            raise UsageError(reason, "leave activations out, or choose int8-dynamic")
        self._grid(symmetric=True)

    def check(self, program: Program) -> list[PreconditionError]:
        """Refuse without calibration where a scheme needs it, and without a layer."""
        if SCHEMES[self.scheme].needs_data and program.calibration is None:
            reason = f"{self.scheme} chooses by what flows through the model, and has no data"
            remedy = "pass calibration=, or --calibration FILE; int8-dynamic and int4-rtn need none"
            return [PreconditionError("model", reason, remedy)]
        plan = self._plan(program)
        if refusal := refused_by(program.target, plan):
            return [refusal]
        layers, left = layers_of(program, self.least, self.heads)
        if any(map(plan.fits, layers)):
            return []
        why = "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:3])
        reason = f"no linear layer to quantize ({why or 'there is none'})"
        return [PreconditionError("model", reason, "set least= or heads=true, or leave it out")]

    def run(self, program: Program) -> Outcome:
        """Fold channel scales, then round each layer's weight; the facts list every layer."""
        plan, edit = self._plan(program), Edit(program, self.name)
        layers, left = layers_of(program, self.least, self.heads)
        narrow = [layer for layer in layers if not plan.fits(layer)]
        left |= {layer.path: "no block of weights divides its inputs" for layer in narrow}
        layers = [layer for layer in layers if layer not in narrow]
        kept = most_sensitive(program, layers, plan, self.keep_float)
        left |= {layer.path: "one of the most sensitive layers" for layer in kept}
        layers = [layer for layer in layers if layer not in kept]
        seen, groups = dict[Node, LayerStatistics](), list[dict[str, Any]]()
        if program.calibration is not None:
            known = observe(program, layers, plan)
            seen = {layer.node: known[layer.source] for layer in layers}
            if plan.scaling:
                seen, groups = fold_scales(edit, layers, plan, known)
                layers = [layer.now() for layer in layers]
            seen = by_weight(layers, seen)
        static = {}
        if plan.activations == "static":
            static = static_ranges(program, layers, plan.observer)
        shared: Known = {}
        rows = [
            quantize_layer(
                edit, layer, plan, seen.get(layer.node), static.get(layer.source, NO_RANGE), shared
            )
            for layer in layers
        ]
        edit.close()
        facts = {"layers": rows, "groups": groups, "float": left}
        notes = [f"{len(rows)} layers on {plan.words(rows)}; {len(left)} stay in float"]
        if plan.scaling and program.calibration is None:
            notes.append("no calibration data: outliers stay in the activations")
        return Outcome(True, tuple(notes), facts)

    def _grid(self, symmetric: bool, gpu: bool = False) -> Grid:
        scheme = SCHEMES[self.scheme]
        own = 0 if gpu and scheme.bits == 8 else scheme.group
        return Grid(scheme.bits, own if self.group < 0 else self.group, symmetric)

    def _plan(self, program: Program) -> Plan:
        scheme = SCHEMES[self.scheme]
        both = program.target is not None and program.target.asymmetric and scheme.bits == 4
        gpu = program.target is not None and program.target.gpu
        symmetric = not both if self.symmetric == "auto" else bool(self.symmetric)
        activations = scheme.activations if self.activations == "auto" else self.activations
        return Plan(
            *(scheme, self._grid(symmetric, gpu), activations),
            *(self.clip, self.alpha, self.observer),
        )
