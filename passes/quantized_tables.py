"""Embedding tables on 8-bit integers, one scale a row: looked up as codes, then scaled."""

from typing import Any

import torch
from torch.fx import Node

from effopt.edit import Edit
from effopt.passes.rounding import Grid, relative_error, round_weight
from effopt.program import module_path, shape, value

aten = torch.ops.aten
EMBEDDING = aten.embedding.default
GRID = Grid(8, 0, symmetric=True)


def quantize_tables(edit: Edit, least: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Round the tables of embeddings; returns a row for each, and by path why others stay.

    A table [V, C] of fewer than `least` rows or columns stays in float, and so does one that
    anything else reads, such as a head that is tied to it.
    """
    rows, left = list[dict[str, Any]](), dict[str, str]()
    lookups: dict[str, list[Node]] = {}
    for node in edit.program.nodes():
        if node.target is EMBEDDING and isinstance(node.args[0], Node):
            table = node.args[0]
            if table.op == "get_attr":
                lookups.setdefault(str(table.target), []).append(node)
    for path, nodes in lookups.items():
        if reason := _why_not(edit, nodes, path, least):
            left[path] = reason
        else:
            rows.append(_quantize(edit, path, nodes))
    return rows, left


def _why_not(edit: Edit, lookups: list[Node], path: str, least: int) -> str:
    """Say why a table stays in float, or ""."""
    table = value(lookups[0].all_input_nodes[0])
    if not table.is_floating_point() or min(shape(lookups[0].all_input_nodes[0])) < least:
        return f"its table has fewer than {least} rows or columns, or holds no floats"
    held = [node for node in edit.program.nodes() if node.op == "get_attr" and node.target == path]
    others = [user for node in held for user in node.users if user not in lookups]
    if others:
        return f"its table is also read by {module_path(others[0]) or others[0].name}"
    return ""


def _quantize(edit: Edit, path: str, lookups: list[Node]) -> dict[str, Any]:
    """Replace the lookups of a table; returns its row for the report."""
    weight = edit.program.weight(lookups[0].all_input_nodes[0]).detach()
    made, stem = round_weight(weight, GRID), path.replace(".", "_")
    codes = edit.constant(f"{stem}_codes", made.codes)
    scale = edit.constant(f"{stem}_scale", made.scale.to(weight.dtype))
    for node in lookups:
        where, *rest = node.args[1:]
        with edit.before(node):
            code = edit.call(EMBEDDING, codes, where, *rest)
            step = edit.call(EMBEDDING, scale, where, *rest)
            real = edit.call(aten.mul.Tensor, edit.call(aten.to.dtype, code, weight.dtype), step)
        edit.replace(node, real)
    change = made.dequantized() - weight.float()
    return {
        "path": path.removesuffix(".weight"),
        "shape": list(weight.shape),
        "bits": GRID.bits,
        "group": weight.shape[1],
        "symmetric": True,
        "error": relative_error(change, weight.float()),
        "measured_on": "weights",
        "kind": "embedding",
    }
