"""What a form of a quantized linear is written with: the linear as read, and a sheet for nodes."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from effopt.backend import Array

MICROSOFT = "com.microsoft"
LARGE = 1 << 20
"""Bytes from which on a tensor is made anew when it is written: to keep what is packed of all
linears would take as much memory as the file."""

T = TypeVar("T")


@dataclass(frozen=True)
class Linear:
    """One quantized linear of an ONNX graph; see `effopt.backends.kernels.quantized_linear`.

    codes [N, K] int8, uint8 with a zero [N, G] uint8, or float8_e4m3fn; scale [N, G] float32.
    `home` is the graph that holds it; linears of one weight agree in `weight`. `launched` is 1
    where it is to be a node of our plugin.
    """

    name: str
    home: ir.Graph
    weight: tuple[str, ...]
    x: ir.Value
    codes: Array
    scale: NDArray[np.float32]
    zero: NDArray[np.uint8] | None
    bias: ir.Value | None
    bits: int
    group: int
    activations: str
    step: float
    origin: int
    launched: int

    @classmethod
    def read(cls, node: ir.Node) -> "Linear":
        """Read a marked node."""
        x, codes, scale, zero, bias = (*node.inputs, None, None)[:5]
        assert x is not None
        assert node.graph is not None
        words: dict[str, Any] = {key: word.value for key, word in node.attributes.items()}
        return cls(
            name=words.pop("linear"),
            home=node.graph,
            weight=tuple(str(v.name) for v in (codes, scale, zero) if v is not None),
            x=x,
            codes=_array(codes),
            scale=_array(scale),
            zero=None if zero is None else _array(zero),
            bias=bias,
            **words,
        )

    @property
    def outputs(self) -> int:
        """N."""
        return int(self.codes.shape[0])

    @property
    def inner(self) -> int:
        """K."""
        return int(self.codes.shape[1])

    @property
    def whole(self) -> bool:
        """Tell whether there is one scale for each output."""
        return self.group == self.inner


def _array(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None, f"{value.name} is no constant"
    return value.const_value.numpy()


def _weight(make: Callable[[], Array | ir.TensorProtocol]) -> ir.TensorProtocol:
    """Return the tensor of what `make` makes.

    It is called again whenever a large tensor is read: it gives the same each time, and what it
    closes over is the linear alone, no copy.
    """
    tensor = _tensor(make())
    if tensor.nbytes < LARGE:
        return tensor
    kind, shape = tensor.dtype, tensor.shape
    assert isinstance(shape, ir.Shape)
    return ir.LazyTensor(lambda: _tensor(make()), dtype=kind, shape=shape, cache=False)


def _tensor(made: Array | ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(np.ascontiguousarray(made)) if isinstance(made, np.ndarray) else made


class Draft:
    """Nodes and constants of the forms of one graph; what is equal is written once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._tape = ir.tape.Tape()
        self._known: dict[Hashable, Any] = {}

    def op(
        self, kind: str, *inputs: ir.Value | None, name: str = "", domain: str = "", **words: Any
    ) -> ir.Value:
        """Write a node of one output."""
        return self._tape.op(kind, inputs, words or None, domain=domain, name=name or None)

    def ops(self, kind: str, *inputs: ir.Value, count: int) -> tuple[ir.Value, ...]:
        """Write a node of several outputs."""
        return tuple(self._tape.op_multi_out(kind, inputs, num_outputs=count))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` made for this key the first time."""
        if key not in self._known:
            self._known[key] = make()
        made: T = self._known[key]
        return made

    def weight(
        self, linear: Linear, part: str, make: Callable[[], Array | ir.TensorProtocol]
    ) -> ir.Value:
        """Return an initializer, `<linear>.<part>`; one for all linears of that weight and form."""
        form = (linear.activations, linear.bits, linear.group, linear.x.dtype, linear.launched)
        key = ("weight", part, linear.weight, form)
        return self.once(key, lambda: self.constant(f"{linear.name}.{part}", _weight(make)))

    def scalar(self, number: float, kind: ir.DataType) -> ir.Value:
        """Return a constant number as an initializer, one for each number and type."""
        key = ("scalar", number, kind)
        array = np.array(number, dtype=kind.numpy())
        return self.once(key, lambda: self.constant(f"scalar.{kind.name.lower()}", array))

    def constant(self, name: str, made: Array | ir.TensorProtocol) -> ir.Value:
        """Add an initializer; a name that is taken gets a number."""
        tensor = _tensor(made)
        shape = ir.Shape(tuple(tensor.shape.numpy()))
        free, count = name, 0
        while free in self._graph.initializers:
            count += 1
            free = f"{name}.{count}"
        value = ir.Value(
            name=free, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=shape
        )
        self._graph.register_initializer(value)
        return value

    def cast(self, linear: Linear, value: ir.Value, to: ir.DataType) -> ir.Value:
        """Return a value that a linear reads in another type, cast once for all its readers."""
        if value.dtype == to:
            return value
        key = ("cast", linear.home, value, to)
        made = self.once(key, lambda: self.op("Cast", value, to=to))
        made.dtype, made.shape = to, value.shape
        return made

    def put_before(self, node: ir.Node) -> None:
        """Insert what was written since the last call ahead of a node."""
        assert node.graph is not None
        node.graph.insert_before(node, self.taken())

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes that were written since the last were taken."""
        return list(self._tape.nodes)

    def taken(self) -> list[ir.Node]:
        """Return the nodes that were written since the last call."""
        nodes = self.nodes
        self._tape = ir.tape.Tape()
        return nodes
