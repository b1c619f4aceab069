"""Embedding tables on 8-bit integers, one scale a row: looked up as codes, then scaled."""

from typing import Any

import torch
from torch.fx import Node

from effopt.edit import Edit
from effopt.errors import at
from effopt.passes.awq import in_parts
from effopt.passes.rounding import TINY, Grid, round_weight
from effopt.program import module_path, shape, value, where

aten = torch.ops.aten
EMBEDDING = aten.embedding.default
GRID = Grid(8, 0, symmetric=True)


def quantize_tables(edit: Edit, least: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Round the tables of embeddings; returns a row for each, and by path why others stay.

    A table [V, C] of fewer than `least` rows or columns stays in float, and so does one that
    anything else reads, such as a head that is tied to it and stays in float.
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
            left[module_path(nodes[0]) or path] = reason
        else:
            rows.append(_quantize(edit, path, nodes))
    return rows, left


def _why_not(edit: Edit, lookups: list[Node], path: str, least: int) -> str:
    """Say why a table stays in float, or ""."""
    table = lookups[0].all_input_nodes[0]
    if not value(table).is_floating_point():
        return "its table holds no floats"
    if min(shape(table)) < least:
        return f"its table has fewer than {least} rows or columns"
    held = [node for node in edit.program.nodes() if node.op == "get_attr" and node.target == path]
    others = [user for node in held for user in node.users if user not in lookups]
    if others:
        return f"its table is also read by {module_path(others[0]) or others[0].name}"
    return ""


def _quantize(edit: Edit, path: str, lookups: list[Node]) -> dict[str, Any]:
    """Replace the lookups of a table; returns its row for the report."""
    weight = edit.program.weight(lookups[0].all_input_nodes[0]).detach()
    with at(where(lookups[0])):
        made = [round_weight(part, GRID) for part in in_parts(weight)]
    stem = path.replace(".", "_")
    codes = edit.constant(f"{stem}_codes", torch.cat([part.codes for part in made]))
    scale = edit.constant(f"{stem}_scale", torch.cat([part.scale for part in made]))
    for node in lookups:
        places, *rest = node.args[1:]
        with edit.before(node):
            code = edit.call(EMBEDDING, codes, places, *rest)
            step = edit.call(EMBEDDING, scale, places, *rest)
            real = edit.call(aten.mul.Tensor, edit.call(aten.to.dtype, code, torch.float32), step)
            if weight.dtype != torch.float32:
                real = edit.call(aten.to.dtype, real, weight.dtype)
        edit.replace(node, real)
    pairs = list(zip(made, in_parts(weight), strict=True))
    lost = sum(float((part.dequantized() - own.float()).square().sum()) for part, own in pairs)
    whole = sum(float(own.float().square().sum()) for _, own in pairs)
    return {
        "path": module_path(lookups[0]) or path,
        "shape": list(weight.shape),
        "bits": GRID.bits,
        "group": weight.shape[1],
        "symmetric": True,
        "error": lost / max(whole, TINY),
        "measured_on": "weights",
        "kind": "embedding",
    }
