"""Safety of an ONNX file from a stranger, checked before any runtime opens it.

effopt is a reader, not a sandbox: what is checked is that the file and its weights stay inside
their folder, that every tensor has the bytes its shape claims, and that opening the file takes
memory in proportion to its size. A file that changes between the check and the runtime's own
opening is outside of what is checked. Free of torch and of any runtime.
"""

import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from effopt.backends.onnx_size import check_sizes
from effopt.errors import UnsafeFileError

MAX_FILE = 2**31 - 1
MAX_NODES = 200_000
MAX_DEPTH = 32
MAX_DENSE = 64 << 20
MAX_REPEATED = 64 << 20
"""Bytes that tensors may share with others of one file, above what the file's weights take."""

_REMEDY = "do not run this file; get it again from a source that you trust"
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
_FILE_READERS = ("EPContext",)  # a com.microsoft operator that loads a compiled blob from a path
_COMPONENT = re.compile(r"[A-Za-z0-9._-]{1,128}")
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}

_BITS: dict[int, int] = {
    TensorProto.BOOL: 8, TensorProto.INT8: 8, TensorProto.UINT8: 8, TensorProto.INT16: 16,
    TensorProto.UINT16: 16, TensorProto.INT32: 32, TensorProto.UINT32: 32, TensorProto.INT64: 64,
    TensorProto.UINT64: 64, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16,
    TensorProto.FLOAT: 32, TensorProto.DOUBLE: 64, TensorProto.COMPLEX64: 64,
    TensorProto.COMPLEX128: 128, TensorProto.FLOAT8E4M3FN: 8, TensorProto.FLOAT8E4M3FNUZ: 8,
    TensorProto.FLOAT8E5M2: 8, TensorProto.FLOAT8E5M2FNUZ: 8, TensorProto.UINT4: 4,
    TensorProto.INT4: 4, TensorProto.FLOAT4E2M1: 4,
}  # fmt: skip
FLOAT8 = frozenset({
    TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ,
})  # fmt: skip
_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def check_file(path: Path) -> frozenset[int]:
    """Check a model file and the weights that it points to; return the types of its tensors.

    Raises UnsafeFileError that names the tensor or node and the rule; nothing outside of the
    file's folder is opened, and no more memory is taken than the file itself needs.
    """
    model = ModelProto()
    try:
        model.ParseFromString(_read(path, MAX_FILE))
    except DecodeError as error:
        raise _unsafe(path.name, "it is no ONNX file, or a damaged one") from error
    if not model.HasField("graph"):
        raise _unsafe(path.name, "it holds no graph")
    weights = _Weights(path.name, os.path.realpath(path.parent))
    _walk(model, weights)
    weights.check_regions()
    check_sizes(model, path.name, weights.total)
    return frozenset(weights.kinds)


def _unsafe(place: str, reason: str) -> UnsafeFileError:
    return UnsafeFileError(f"{place}: {reason}", _REMEDY)


def _open(path: str, place: str) -> int:
    """Open a plain file of its own: no link to a file elsewhere, soft or hard."""
    try:
        # Not blocking: opening a pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise _unsafe(place, f"it cannot be opened ({error.strerror}), or is a link") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(descriptor)
        raise _unsafe(place, "it is no regular file, or a second name (hard link) of another")
    return descriptor


def _read(path: Path, limit: int) -> bytes:
    with open(_open(str(path), path.name), "rb") as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise _unsafe(path.name, f"it is larger than {limit} bytes")
        return file.read()


@dataclass
class _Weights:
    """Where tensors may have their bytes: `base` is the real path of the model's folder."""

    model: str
    base: str
    total: int = 0
    kinds: set[int] = field(default_factory=set)
    repeated: int = 0
    regions: set[tuple[str, int, int]] = field(default_factory=set)
    """Location, begin and end of the bytes that lie beside the file."""

    def check(self, tensor: TensorProto) -> None:
        """Check one tensor's shape against its bytes, inside the file or beside it."""
        place = f"{self.model}: tensor {_shown(tensor.name)}"
        if any(size < 0 for size in tensor.dims):
            raise _unsafe(place, f"a negative size in {list(tensor.dims)}")
        count = math.prod(tensor.dims)
        self.kinds.add(tensor.data_type)
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            self._external(tensor, place, _bytes(tensor, count, place))
        elif tensor.data_type == TensorProto.STRING:
            if len(tensor.string_data) != count:
                raise _unsafe(place, f"{len(tensor.string_data)} strings for {count} elements")
        else:
            self.total += _inline(tensor, place, count)

    def check_regions(self) -> None:
        """Refuse many tensors on the same bytes, which a runtime may copy for each of them.

        Equal tensors may lie on the same bytes; together they may repeat as many as there are.
        """
        ends: dict[str, int] = {}
        for location, begin, end in sorted(self.regions):
            if begin < ends.get(location, 0):
                place = f"{self.model}: {_shown(location)}"
                raise _unsafe(place, f"tensors overlap at byte {begin} without being the same")
            ends[location] = max(end, ends.get(location, 0))
        if self.repeated > max(MAX_REPEATED, self.total):
            reason = f"its tensors share {self.repeated} bytes, and have {self.total} of their own"
            raise _unsafe(self.model, reason)

    def _external(self, tensor: TensorProto, place: str, size: int) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if set(entries) - _EXTERNAL_KEYS or len(entries) != len(tensor.external_data):
            raise _unsafe(place, f"unknown or repeated entries among {sorted(entries)}")
        if tensor.HasField("raw_data") or any(len(getattr(tensor, f)) for f in _FIELDS):
            raise _unsafe(place, "it has bytes both inside and outside of the file")
        length = _number(entries["length"], place, "length") if "length" in entries else size
        offset = _number(entries["offset"], place, "offset") if "offset" in entries else 0
        if length != size:
            raise _unsafe(place, f"length {length} for a shape of {size} bytes")
        descriptor = _open(self._inside(entries.get("location", ""), place), place)
        there = os.fstat(descriptor).st_size
        os.close(descriptor)
        if offset + length > there:
            raise _unsafe(place, f"its bytes end at {offset + length}, the file at {there}")
        region = (entries["location"], offset, offset + length)
        known = region in self.regions
        self.regions.add(region)
        self.total, self.repeated = self.total + size * (not known), self.repeated + size * known

    def _inside(self, location: str, place: str) -> str:
        """Return the path of a location that stays in the folder, links resolved."""
        parts = location.split("/")
        plain = all(_COMPONENT.fullmatch(part) and part not in (".", "..") for part in parts)
        joined = os.path.join(self.base, location)
        full = os.path.realpath(joined) if plain else ""
        if not plain or os.path.commonpath([self.base, full]) != self.base or full != joined:
            raise _unsafe(place, f"its location {_shown(location)} leaves the folder")
        return full


def _shown(name: str) -> str:
    """Quote a name from the file: no control characters, no endless line."""
    return ascii(name if len(name) <= 100 else name[:100] + "...")


def _number(text: str, place: str, what: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise _unsafe(place, f"its {what} is {_shown(text)}")
    return int(text)


def _bytes(tensor: TensorProto, count: int, place: str) -> int:
    if tensor.data_type not in _BITS:
        raise _unsafe(place, f"data type {tensor.data_type} is unknown or has no fixed size")
    return (count * _BITS[tensor.data_type] + 7) // 8


def _inline(tensor: TensorProto, place: str, count: int) -> int:
    """Compare the bytes in the file with the shape; return how many they are."""
    size = _bytes(tensor, count, place)
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != size:
            raise _unsafe(place, f"{len(tensor.raw_data)} bytes for a shape of {size}")
        return size
    held = sum(len(getattr(tensor, name)) for name in _FIELDS)
    packed = (count + 1) // 2 if _BITS[tensor.data_type] == 4 else count
    parts = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
    if held != packed * parts:
        raise _unsafe(place, f"{held} elements for a shape of {count}")
    return size


# --- every tensor and node of a model ---------------------------------------------------------


@dataclass(frozen=True)
class _Function:
    """What a call becomes: nodes, those of subgraphs among them, and bytes of constants."""

    nodes: int
    bytes: int


_Calls = Mapping[tuple[str, str], _Function]


def _walk(model: ModelProto, weights: _Weights) -> None:
    """Visit all graphs, functions, subgraphs and attributes, without recursion."""
    known: _Calls = _functions(model, weights)
    trained = [g for info in model.training_info for g in (info.initialization, info.algorithm)]
    # What a node may call: functions call none, or a few of them would become endless graphs.
    stack: list[tuple[GraphProto | FunctionProto, int, _Calls]] = [
        *((graph, 0, known) for graph in (model.graph, *trained)),
        *((body, 0, {}) for body in model.functions),
    ]
    count = copied = 0
    while stack:
        body, depth, known = stack.pop()
        if depth > MAX_DEPTH:
            raise _unsafe(weights.model, f"subgraphs are nested more than {MAX_DEPTH} deep")
        called = [known[key] for node in body.node if (key := _key(node)) in known]
        count += len(body.node) + sum(function.nodes for function in called)
        copied += sum(function.bytes for function in called)
        if count > MAX_NODES:
            raise _unsafe(weights.model, f"more than {MAX_NODES} nodes")
        if copied > MAX_REPEATED:
            raise _unsafe(weights.model, f"its functions repeat {copied} bytes of constants")
        if isinstance(body, GraphProto):
            _check_graph_tensors(body, weights)
        defaults = body.attribute_proto if isinstance(body, FunctionProto) else ()
        own = (a for node in body.node for a in _checked(node, weights, known))
        for attribute in (*defaults, *own):
            _check_attribute(attribute, weights)
            stack += [(graph, depth + 1, known) for graph in _graphs(attribute)]


def _key(node: NodeProto) -> tuple[str, str]:
    return node.domain, node.op_type


def _functions(model: ModelProto, weights: _Weights) -> dict[tuple[str, str], _Function]:
    """Return the functions by domain and name; each is there once, in a domain of its own."""
    found: dict[tuple[str, str], _Function] = {}
    for body in model.functions:
        place = f"{weights.model}: function {_shown(body.name)}"
        if body.domain in _DOMAINS:
            raise _unsafe(place, f"it stands in the operator domain {_shown(body.domain)}")
        if body.overload or (body.domain, body.name) in found:
            raise _unsafe(place, "it is there more than once")
        found[body.domain, body.name] = _Function(_size_of(body), body.ByteSize())
    return found


def _size_of(function: FunctionProto) -> int:
    """Count the nodes of a function and of the graphs inside of them."""
    count, bodies = 0, [*_bodies(function)]
    for body in bodies:
        count += len(body.node)
        bodies += _bodies(body)
    return count + len(function.node)


def _bodies(body: GraphProto | FunctionProto) -> list[GraphProto]:
    return [graph for node in body.node for a in node.attribute for graph in _graphs(a)]


def _check_graph_tensors(graph: GraphProto, weights: _Weights) -> None:
    for tensor in graph.initializer:
        weights.check(tensor)
    for sparse in graph.sparse_initializer:
        _check_sparse(sparse, weights)


def _checked(node: NodeProto, weights: _Weights, known: _Calls) -> Iterator[AttributeProto]:
    place = f"{weights.model}: node {_shown(node.name or node.op_type)}"
    if node.domain not in _DOMAINS and (_key(node) not in known or node.overload):
        raise _unsafe(place, f"operator domain {_shown(node.domain)} needs a library of its own")
    if node.op_type in _FILE_READERS:
        raise _unsafe(place, f"{node.op_type} loads another file")
    yield from node.attribute


def _check_attribute(attribute: AttributeProto, weights: _Weights) -> None:
    for tensor in (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else ())):
        weights.check(tensor)
    lone = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for sparse in (*attribute.sparse_tensors, *lone):
        _check_sparse(sparse, weights)


def _graphs(attribute: AttributeProto) -> list[GraphProto]:
    return [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())]


def _check_sparse(sparse: onnx.SparseTensorProto, weights: _Weights) -> None:
    place = f"{weights.model}: sparse tensor {_shown(sparse.values.name)}"
    weights.check(sparse.values)
    weights.check(sparse.indices)
    if any(size < 0 for size in sparse.dims):
        raise _unsafe(place, f"a negative size in {list(sparse.dims)}")
    if _bytes(sparse.values, math.prod(sparse.dims), place) > MAX_DENSE:
        raise _unsafe(place, f"it would take more than {MAX_DENSE} bytes when unpacked")
