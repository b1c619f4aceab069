"""quantize: linear layers on integer or narrow weights, by any scheme of `effopt.passes.schemes`.

Channel scales are chosen and folded in float first, which changes nothing; then weights are
rounded. Sources: AWQ (arXiv 2306.00978), SmoothQuant (2211.10438), GPTQ (2210.17323).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch.fx import Node

from effopt.edit import Edit
from effopt.errors import PreconditionError, UsageError, VerificationError, unknown
from effopt.memory import give_back
from effopt.passes.channel_scales import fold_scales
from effopt.passes.float_weights import FLOATS
from effopt.passes.layer_rounding import Known, quantize_layer
from effopt.passes.layer_statistics import LayerStatistics, by_weight, observe, static_ranges
from effopt.passes.observers import OBSERVERS
from effopt.passes.quantizable import Layer, layers_of
from effopt.passes.quantization_plan import Plan
from effopt.passes.quantized_tables import quantize_tables
from effopt.passes.rounding import Grid
from effopt.passes.schemes import SCHEMES
from effopt.passes.sensitivity import Trial, most_sensitive, within_budget
from effopt.passes.weight_sizes import weight_sizes
from effopt.pipeline import Outcome
from effopt.products import Limit, product
from effopt.program import Program, where
from effopt.target import Target

LEAST_BLOCK = 16
"""The smallest block that engines take."""

NO_RANGE = (1.0, 0)
"""Step and origin of activations whose range is not fixed beforehand."""


@dataclass(frozen=True)
class Quantize:
    """Put linear layers on integer or narrow weights, as a scheme says; others stay in float."""

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
    max_loss: float = field(
        default=0.0,
        metadata={
            "help": "layers stay in float until outputs change by at most this share; 0: any"
        },
    )
    activations: str = field(
        default="auto", metadata={"help": "what shares a range: row or tensor (int8-dynamic)"}
    )
    alpha: float | str = field(
        default="auto",
        metadata={"help": "share of outliers that goes into int8 weights; auto: searched; 0: none"},
    )
    observer: str = field(
        default="minmax", metadata={"help": "range of activations (int8-static, fp8)"}
    )
    least: int = field(default=64, metadata={"help": "layers of fewer channels stay in float"})
    heads: bool = field(default=False, metadata={"help": "quantize the last layers too"})
    embeddings: bool = field(default=False, metadata={"help": "tables of embeddings on 8 bits too"})

    def __post_init__(self) -> None:
        known = {"scheme": SCHEMES, "activations": ("auto", "row", "tensor"), "observer": OBSERVERS}
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise unknown(name, getattr(self, name), words)
        for holds, given, remedy in self._ranges():
            if not holds:
                raise UsageError(given, remedy)
        self._check_meant()
        self._grid(symmetric=True)

    def _ranges(self) -> list[tuple[bool, str, str]]:
        """Return what must hold of each option, what was given, and what to give instead."""
        share = isinstance(self.alpha, (int, float)) and 0 <= self.alpha <= 1
        group = self.group < 1 or self.group >= LEAST_BLOCK
        return [
            (
                self.symmetric in ("auto", True, False),
                f"symmetric is {self.symmetric!r}",
                "write auto, true or false",
            ),
            (
                self.group >= -1 and group,
                f"group is {self.group}",
                f"give 0, a power of 2 from {LEAST_BLOCK}, or leave it out",
            ),
            (
                self.alpha == "auto" or share,
                f"alpha is {self.alpha!r}",
                "give a share from 0 to 1, or auto",
            ),
            (self.keep_float >= 0, f"keep-float is {self.keep_float}", "give a count from 0"),
            (self.max_loss >= 0, f"max-loss is {self.max_loss}", "give a share from 0"),
            (self.least >= 1, f"least is {self.least}", "give a count from 1"),
            (
                not (self.keep_float and self.max_loss),
                "keep-float and max-loss both say which layers stay in float",
                "give one of them",
            ),
        ]

    def _check_meant(self) -> None:
        """Raise UsageError for an option that the scheme does not look at."""
        defaults = {option.name: option.default for option in fields(self)}
        for name in _OF_SCHEMES:
            meant = name in SCHEMES[self.scheme].options
            if not meant and getattr(self, name) != defaults[name]:
                others = [scheme for scheme, row in SCHEMES.items() if name in row.options]
                reason = f"{self.scheme} has no option {name!r}"
                raise UsageError(reason, f"leave {name} out, or choose {' or '.join(others)}")

    def check(self, program: Program) -> list[PreconditionError]:
        """Refuse without calibration where a scheme needs it, and without a layer."""
        if SCHEMES[self.scheme].needs_data and program.calibration is None:
            reason = f"{self.scheme} chooses by what flows through the model, and has no data"
            remedy = "pass calibration=, or --calibration FILE; int8-dynamic and int4-rtn need none"
            return [PreconditionError("model", reason, remedy)]
        if self.alpha not in ("auto", 0) and program.calibration is None:
            reason = f"alpha={self.alpha} moves outliers by what flows through the model: no data"
            return [PreconditionError("model", reason, "pass calibration=, or leave alpha out")]
        plan = self._plan(program)
        if isinstance(plan, Limit):
            name = program.target.name if program.target else "model"
            return [PreconditionError(name, *plan)]
        layers, left = self._layers(program, plan)
        if layers:
            return []
        why = "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:3])
        reason = f"no linear layer to quantize ({why or 'there is none'})"
        return [PreconditionError("model", reason, "set least= or heads=true, or leave it out")]

    def run(self, program: Program) -> Outcome:
        """Fold channel scales, then round each layer's weight; the facts list every layer."""
        plan, edit = self._plan(program), Edit(program, self.name)
        assert isinstance(plan, Plan), "checked"
        before, sizes = program.run(program.samples), weight_sizes(program)
        layers, left = self._layers(program, plan)
        trial = Trial(program, plan) if self.keep_float or self.max_loss else None
        kept = self._kept(trial, layers)
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
        _check_range(plan, layers, seen)
        static = static_ranges(program, layers, plan) if plan.calibrated else {}
        shared: Known = {}
        rows = list[dict[str, Any]]()
        for layer in layers:
            ends = static[layer.source] if plan.calibrated else NO_RANGE
            rows.append(quantize_layer(edit, layer, plan, seen.get(layer.node), ends, shared))
            give_back()
        tables, others = quantize_tables(edit, self.least) if self.embeddings else ([], {})
        edit.close()
        _check_finite(before, program)
        notes = self._within(trial, program) if trial else []
        give_back()
        after = weight_sizes(program)
        facts = {"layers": [*rows, *tables], "groups": groups, "float": left | others}
        facts["bytes"] = {kind: [size, after[kind]] for kind, size in sizes.items()}
        words = f"{len(rows)} layers on {plan.words(rows)}; {len(left)} stay in float"
        return Outcome(True, (words, *notes, *_remarks(plan, seen, layers, tables)), facts)

    def _layers(self, program: Program, plan: Plan) -> tuple[list[Layer], dict[str, str]]:
        """Return the layers that can be quantized, and by path why others stay in float."""
        layers, left = layers_of(program, self.least, self.heads)
        out = {layer.path: reason for layer in layers if (reason := plan.why_not(program, layer))}
        return [layer for layer in layers if layer.path not in out], left | out

    def _kept(self, trial: Trial | None, layers: Sequence[Layer]) -> list[Layer]:
        """Return the layers that stay in float because they are sensitive."""
        if trial is None:
            return []
        if self.keep_float:
            return most_sensitive(trial, layers, self.keep_float)
        return within_budget(trial, layers, self.max_loss)[0]

    def _within(self, trial: Trial, program: Program) -> list[str]:
        """Note what the outputs lost in the end; PreconditionError where that is too much."""
        loss = trial.distance(program.run(trial.inputs))
        if self.max_loss and not loss <= self.max_loss:
            reason = f"the outputs change by {loss:.2g} of their energy, above max-loss"
            raise PreconditionError("model", reason, "raise max-loss, or choose another scheme")
        return [f"the outputs change by {loss:.2g} of their energy, on the first batch"]

    def _grid(self, symmetric: bool, whole: bool = False) -> Grid:
        scheme = SCHEMES[self.scheme]
        own = 0 if whole else scheme.group
        group = own if self.group < 0 else self.group
        return Grid(min(scheme.bits, 8), group, symmetric, floating=scheme.weights == "fp8")

    def _plan(self, program: Program) -> Plan | Limit:
        """Resolve the options for a program's target, or say why it cannot run the scheme."""
        scheme, target = SCHEMES[self.scheme], program.target
        activations = scheme.activations if self.activations == "auto" else self.activations
        both = target is not None and target.asymmetric and scheme.bits == 4
        symmetric = not both if self.symmetric == "auto" else bool(self.symmetric)
        alpha = None if isinstance(self.alpha, str) else self.alpha
        inside, runs = False, None
        if scheme.rounding == "cast" and target is not None:
            inside = scheme.weights in target.dtypes
            if target.gpu and not inside:
                reason = f"it does not compute in {scheme.weights}"
                return Limit(reason, f"it computes in {', '.join(target.dtypes)}")
        elif scheme.rounding not in FLOATS:
            kind = target.kind if target else "portable"
            found = product(kind, scheme.weights, activations, target)
            if isinstance(found, Limit):
                return found._replace(remedy=f"choose {', '.join(_schemes_of(target))}")
            runs = found
        grid = self._grid(symmetric, whole=runs is not None and runs.whole)
        plan = Plan(scheme, grid, activations, runs, inside, self.clip, alpha, self.observer)
        return plan.limit or plan


_OF_SCHEMES = ("group", "symmetric", "clip", "activations", "alpha", "observer")
"""Options that mean something for some schemes alone."""


def _schemes_of(target: Target | None) -> list[str]:
    """Return the schemes of which a target runs the products."""
    kind = target.kind if target else "portable"
    rows = [(name, row) for name, row in SCHEMES.items() if row.rounding not in FLOATS]
    products = [(name, product(kind, row.weights, row.activations, target)) for name, row in rows]
    return [name for name, found in products if not isinstance(found, Limit)]


def _check_range(plan: Plan, layers: Sequence[Layer], seen: dict[Node, LayerStatistics]) -> None:
    """Raise PreconditionError where inputs that were seen do not fit the type to compute in."""
    if not plan.inside:
        return
    top = torch.finfo(getattr(torch, plan.scheme.weights)).max
    for layer in layers:
        if layer.node in seen and not float(seen[layer.node].most.max()) <= top:
            reason = f"inputs that the calibration data has are beyond {plan.scheme.weights}"
            raise PreconditionError(where(layer.node), reason, "choose bf16")


def _check_finite(before: Sequence[torch.Tensor], program: Program) -> None:
    """Raise VerificationError where an output is no number any more."""
    for place, (was, now) in enumerate(zip(before, program.run(program.samples), strict=True)):
        if now.is_floating_point() and bool((was.isfinite() & ~now.isfinite()).any()):
            reason = f"output {place} is infinite or no number after quantization"
            raise VerificationError(reason, "choose a scheme of a wider range, such as bf16")


def _remarks(
    plan: Plan,
    seen: dict[Node, LayerStatistics],
    layers: Sequence[Layer],
    tables: Sequence[object],
) -> list[str]:
    """Say what is worth knowing of a result."""
    notes = [f"{len(tables)} tables of embeddings on 8 bits"] if tables else []
    if plan.scaling and not seen:
        notes.append("no calibration data: outliers stay in the activations")
    silent = [
        layer.path for layer in layers if layer.node in seen and not seen[layer.node].most.any()
    ]
    if silent:
        notes.append(f"the calibration data has only zeros for {len(silent)} layers: {silent[0]}")
    return notes
