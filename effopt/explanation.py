"""explain: what can be done to a model, where, and why not."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from effopt.axes import find_axes
from effopt.capture import capture
from effopt.masks import find_padding
from effopt.pipeline import Pipeline
from effopt.program import Program, module_path, source_line, where
from effopt.recipe import steps_of
from effopt.sites import Site, TokenAxis, find_tokens
from effopt.tokens import Kind


@dataclass(frozen=True)
class SiteRow:
    """One block: where tokens may leave, or the reason why not and what to do."""

    block: int
    path: str
    node: str
    usable: bool
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class AxisRow:
    """One token axis. `size` is a number or a name; `effects` counts operators by effect."""

    name: str
    size: str
    prefix: int
    suffix: int
    picks: tuple[int, ...]
    padding: bool
    merging: str
    pruning: str
    effects: dict[str, int]
    sites: tuple[SiteRow, ...]


@dataclass(frozen=True)
class Unknown:
    """An operator that the axis analysis could not follow."""

    node: str
    path: str
    source: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What effopt found in a model."""

    model: str
    operators: int
    attention: int
    axes: tuple[AxisRow, ...]
    unknown: tuple[Unknown, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        record: dict[str, Any] = asdict(self)
        return record

    def text(self, width: int = 80) -> str:
        """Return tables of at most `width` columns."""
        from effopt.explain_text import render

        return render(self, width)


def explain(
    model: nn.Module | ExportedProgram,
    example_inputs: object = None,
    *,
    dynamic: Sequence[str] = ("batch",),
    seed: int = 0,
) -> Explanation:
    """Capture a model, bring it to its normal form, and say what can be done to it.

    Arguments as in `effopt.optimize`; raises UsageError and CaptureError as it does.
    """
    captured = capture(model, example_inputs, dynamic=dynamic, seed=seed)
    program, _ = Pipeline(steps_of("exact")).run(captured)
    calls = sum("scaled_dot_product_attention" in str(n.target) for n in program.nodes())
    unknown = program.get(find_axes).unknown
    return Explanation(
        model=type(model).__name__,
        operators=sum(node.op == "call_function" for node in program.nodes()),
        attention=calls,
        axes=tuple(_axis_row(program, axis) for axis in program.get(find_tokens)),
        unknown=tuple(
            Unknown(node.name, module_path(node), source_line(node), reason)
            for node, reason in unknown.items()
        ),
    )


def _axis_row(program: Program, axis: TokenAxis) -> AxisRow:
    kinds = [found.kind.value for found in axis.effects.values()]
    padding = find_padding(axis)
    sites = tuple(_site_row(site) for site in axis.sites)
    usable = any(site.usable for site in sites)
    none = "" if usable else "no usable site"
    return AxisRow(
        name=axis.name,
        size=str(axis.size) if isinstance(axis.size, int) else _size_name(program, axis),
        prefix=axis.prefix,
        suffix=axis.suffix,
        picks=axis.picks,
        padding=padding.mask is not None,
        merging=none or (str(padding.refusal) if padding.refusal else ""),
        pruning=none or ("" if axis.picks else "no output picks a class token"),
        effects={kind.value: kinds.count(kind.value) for kind in Kind if kind.value in kinds},
        sites=sites,
    )


def _size_name(program: Program, axis: TokenAxis) -> str:
    return program.dynamic.get(str(axis.size), str(axis.size))


def _site_row(site: Site) -> SiteRow:
    if site.refusal is None:
        return SiteRow(site.block, site.path, where(site.node), True)
    refusal = site.refusal
    return SiteRow(site.block, site.path, refusal.node, False, refusal.reason, refusal.remedy)
