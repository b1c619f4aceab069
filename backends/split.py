"""Exits as engines: one file a segment, all of them on one file of weights.

A segment holds no control flow: what calls it decides which rows go on. Weights lie in
`model.onnx.data`, each once, whichever segments read it; small constants stay in the segments.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.external_data import convert_tensors_to_external
from torch.fx import Node

from effopt.backends.onnx import WEIGHTS
from effopt.backends.onnx_exits import lowered
from effopt.backends.onnx_file import check_written, finish
from effopt.backends.split_record import SegmentFile, Split
from effopt.program import Program
from effopt.segments import Segment, batch_size, row_place, row_places, segments
from effopt.signature import Signature, TensorSpec

FORM = "split"
PAGE = 4096
"""Bytes of a tensor from which on it lies in the file of weights, and begins at a multiple of:
the operating system maps files in pages of that size."""


def write_split(
    program: Program,
    folder: Path,
    kind: str,
    provenance: Mapping[str, str],
    *,
    extended: bool,
    plugins: bool = False,
) -> Split:
    """Write `segment1.onnx`, ... and their weights into an existing folder; see `onnx_file.save`.

    Raises PreconditionError as `save` and `onnx_lower.lower` do, and where rows cannot leave.
    """
    parts = segments(program)
    rows = row_places(parts)
    named = {
        node.name: spec.name
        for node, spec in zip(program.inputs(), program.signature.inputs, strict=True)
    }
    models = lowered(parts, kind, plugins=plugins)
    files = []
    for place, (part, model) in enumerate(zip(parts, models, strict=True)):
        signature = _renamed(part.program.signature, named)
        ports = finish(model, signature, provenance, extended=extended)
        ready = {name: row_place(node, batch_size(parts)) for name, node in _ready(part).items()}
        record = (part.scored, part.answers, ready, part.handed)
        files.append(SegmentFile(f"segment{place + 1}.onnx", signature.with_ports(ports), *record))
    share_weights([model.graph for model in models], folder)
    for file, model in zip(files, models, strict=True):
        ir.save(model, folder / file.file)
        check_written(folder / file.file)
    return Split(tuple(files), {named.get(name, name): place for name, place in rows.items()})


def _renamed(signature: Signature, names: Mapping[str, str]) -> Signature:
    """Let inputs of the model have its own names."""

    def renamed(spec: TensorSpec) -> TensorSpec:
        name = names.get(spec.name, spec.name)
        return replace(spec, name=name, port=name)

    return replace(signature, inputs=tuple(map(renamed, signature.inputs)))


def _ready(part: Segment) -> dict[str, Node]:
    """Return the nodes of outputs that no exit changes."""
    (nodes,) = part.program.output().args
    start = part.scored + len(part.answers)
    found: Any = nodes[start : start + len(part.ready)]  # type: ignore[index]
    return dict(zip(part.ready, found, strict=True))


def share_weights(graphs: Sequence[ir.Graph], folder: Path) -> None:
    """Move large constants of all graphs into one file, equal bytes once.

    The graphs point to it from then on. Nothing is written where no constant is large.
    """
    values = [
        value
        for graph in graphs
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= PAGE
    ]
    keys = [hashlib.sha256(_constant(value).tobytes()).digest() for value in values]
    first = {key: _constant(value) for key, value in reversed([*zip(keys, values, strict=True)])}
    kept = [first[key] for key in dict.fromkeys(keys)]
    if not kept:
        return
    made = convert_tensors_to_external(
        kept, folder, WEIGHTS, alignment=PAGE, align_threshold=PAGE - 1
    )
    homes = dict(zip(dict.fromkeys(keys), made, strict=True))
    for key, value in zip(keys, values, strict=True):
        own, home = _constant(value), homes[key]
        value.const_value = ir.ExternalTensor(
            WEIGHTS,
            home.offset,
            home.length,
            own.dtype,
            shape=ir.Shape(own.shape.numpy()),
            name=value.name or "",
            base_dir=folder,
        )


def _constant(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value
