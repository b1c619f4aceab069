"""The rows of an explanation, read off a program and its analyses."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.fx import Node

from effopt.attention import SDPA, is_causal, mask_of, qkv_of
from effopt.axes import find_axes, leaves, same_size
from effopt.axis_rules import first
from effopt.axis_table import family
from effopt.causal import hides_later, looks_back, own_calls
from effopt.cuts import content, find_cuts
from effopt.errors import EffoptError
from effopt.explain_records import (
    AxisRow,
    CallRow,
    ExitRow,
    GroupRow,
    InputRow,
    Refusal,
    SiteRow,
    Size,
    Technique,
    UnknownRow,
)
from effopt.masks import parts_of
from effopt.pipeline import Pipeline, Step, make_pass
from effopt.program import Place, Program, module_path, place_of, shape, where
from effopt.scales import ScaleGroup, find_scales
from effopt.sites import Site, TokenAxis, find_tokens
from effopt.spec import Item, parse
from effopt.tokens import Kind, Range


def place(node: Node) -> Place:
    """Return the place of a node."""
    return place_of(where(node))


def input_rows(program: Program) -> tuple[InputRow, ...]:
    """Return the inputs in order."""
    return tuple(InputRow(row.name, row.dtype, row.shape) for row in program.signature.inputs)


def axis_rows(program: Program) -> tuple[AxisRow, ...]:
    """Return the token axes in order of first use; every probe is tried on each."""
    return tuple(_axis_row(program, axis) for axis in program.get(find_tokens))


def _axis_row(program: Program, axis: TokenAxis) -> AxisRow:
    kinds = Counter(found.kind for found in axis.effects.values())
    calls = program.get(call_rows)
    return AxisRow(
        name=axis.name,
        size=_size(program, axis.size),
        batch=_size(program, shape(qkv_of(axis.sites[0].attention)[0])[0]),
        made_by=_origin(program, axis),
        prefix=axis.prefix,
        suffix=axis.suffix,
        picks=axis.picks,
        emitted=bool(kinds[Kind.EMIT]),
        causal=looks_back(program, axis),
        padding=any(row.queries == axis.name and "padding" in row.mask for row in calls),
        techniques=_techniques(program, axis.name),
        effects={kind.value: kinds[kind] for kind in Kind if kinds[kind]},
        sites=tuple(_site_row(site) for site in axis.sites),
    )


def _size(program: Program, size: Any) -> Size:
    return size if isinstance(size, int) else str(program.name_of(size))


def _origin(program: Program, axis: TokenAxis) -> Place:
    """Find the first value that holds something of the inputs for each token."""
    held = program.get(content)
    for node in program.nodes():
        spots = axis.tokens.on(node).values() if node in held else ()
        if any(isinstance(s, Range) and s.pure and same_size(s.stop, axis.size) for s in spots):
            return place(node)
    return Place()


def _site_row(site: Site) -> SiteRow:
    refusal = None if site.refusal is None else Refusal.of(site.refusal)
    spot = replace(place(site.node), path=site.path)
    return SiteRow(site.block, spot, refusal is None, refusal)


def _techniques(program: Program, axis: str) -> dict[str, Technique]:
    from effopt.passes import PROBES

    return {name: _try(program, spec, axis) for name, spec in PROBES.items()}


def _try(program: Program, spec: str, axis: str) -> Technique:
    """Run a pass on a fork of the program, for this axis alone."""
    (item,) = parse(spec)
    made = make_pass(Item(item.name, {**item.options, "axis": axis}))
    try:
        _, (record,) = Pipeline([Step(made)]).run(program)
    except EffoptError as error:
        return Technique(spec, False, Refusal.of(error))
    except Exception as error:  # noqa: BLE001 - the model can be explained all the same
        return Technique(spec, False, defect(made.name, error))
    if record.changed:
        return Technique(spec, True, None)
    reason = ", ".join(record.notes) or "nothing would change"
    return Technique(spec, False, Refusal(Place(), reason, "choose other blocks or options"))


def defect(work: str, error: Exception) -> Refusal:
    """Say that we failed where an error of ours should have said why."""
    words = str(error).strip().split("\n")[0]
    reason = f"{work} failed: {type(error).__name__}" + (f": {words}" if words else "")
    return Refusal(Place(), reason, "this is a defect of effopt: please report it")


def call_rows(program: Program) -> tuple[CallRow, ...]:
    """Return the attention calls, numbered as blocks (an Analysis)."""
    calls = [node for node in program.nodes() if node.target is SDPA]
    axes = program.get(find_tokens)
    return tuple(_call_row(program, block, call, axes) for block, call in enumerate(calls))


def _call_row(program: Program, block: int, call: Node, axes: tuple[TokenAxis, ...]) -> CallRow:
    found = program.get(find_axes)
    names = {axis.tokens.dim: axis.name for axis in axes}
    query, key = qkv_of(call)[:2]
    asks, asked = leaves(found.of(query)[-2]), leaves(found.of(key)[-2])
    sizes, asked_size = shape(query), shape(key)[-2]
    own = is_causal(call) or any(call in own_calls(axis) for axis in axes)
    causal = own and hides_later(program, call)
    return CallRow(
        block=block,
        place=place(call),
        queries=names.get(asks, ""),
        queries_size=_size(program, sizes[-2]),
        keys=names.get(asked, ""),
        keys_size=_size(program, asked_size),
        cross=asks != asked,
        heads=_size(program, sizes[1]) if len(sizes) == 4 else 1,
        head_dim=_size(program, sizes[-1]),
        causal=causal,
        mask=_mask_words(program, call, causal),
    )


def _mask_words(program: Program, call: Node, causal: bool) -> str:
    """Say what a mask does: conditions hide keys or pairs, what is learned or fixed is a bias."""
    parts, held = parts_of(mask_of(call)), program.get(content)
    hides = [*parts.seen, *(part for part in parts.added if _is_unlearned(part, held))]
    words = ["causal"] if causal else []
    for part in hides:
        sizes = shape(part)
        pairs = len(sizes) > 1 and not same_size(sizes[-2], 1)
        words.append(("causal" if causal else "pairs") if pairs else "padding")
    if len(hides) < len(parts.seen) + len(parts.added) and not (causal and not hides):
        words.append("bias")
    return "+".join(dict.fromkeys(words)) or "none"


def _is_unlearned(part: Node, held: set[Node]) -> bool:
    return part in held and family(part) in ("pointwise", "cast", "view", "expand", "slice", "")


def exit_rows(program: Program) -> tuple[ExitRow, ...]:
    """Return the cuts, in order."""
    return tuple(ExitRow(cut.block, place(cut.node), cut.share) for cut in program.get(find_cuts))


def group_rows(program: Program) -> tuple[GroupRow, ...]:
    """Return the linear layers that share scales, in order; those that cannot have any last."""
    scales = program.get(find_scales)
    held = {linear for group in scales.groups for linear in group.linears}
    rest: dict[Node, list[Node]] = {}
    for node in program.nodes():
        if family(node) == "linear" and node not in held:
            rest.setdefault(first(node), []).append(node)
    found = [_group_row(group, scales.pinned.get(group.source, "")) for group in scales.groups]
    return (*found, *(_unscaled_row(program, *item) for item in rest.items()))


def _group_row(group: ScaleGroup, pinned: str) -> GroupRow:
    return GroupRow(
        source=place(group.source),
        family=family(group.source) or group.source.op,
        linears=_paths(group.linears),
        kind=group.kind,
        channels=len(group.roots),
        scales=group.count,
        producers=_paths(group.producers),
        pinned=pinned if group.kind == "mul" else "",
    )


def _unscaled_row(program: Program, source: Node, linears: Sequence[Node]) -> GroupRow:
    return GroupRow(
        source=place(source),
        family=family(source) or source.op,
        linears=_paths(linears),
        kind="none",
        channels=_size(program, shape(source)[-1]),
        scales=0,
        producers=(),
        pinned="a weight is computed, or read elsewhere too",
    )


def _paths(nodes: Sequence[Node]) -> tuple[str, ...]:
    return tuple(module_path(node) or node.name for node in nodes)


def unknown_rows(program: Program) -> tuple[UnknownRow, ...]:
    """Return the operators that the axis analysis could not follow."""
    unknown = program.get(find_axes).unknown
    return tuple(UnknownRow(place(node), reason) for node, reason in unknown.items())
