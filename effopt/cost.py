"""Cost: multiply-accumulates of a program, counted from its graph.

Counted: matrix products, attention and convolutions. Not counted, as in the papers that print
such figures: norms, softmax, activations, gathers, and the operators of the `effopt` namespace
(matching tokens). The figure is that of the formula
`L (4 N C^2 + 2 N^2 C + 2 ratio N C^2) + patch embedding + head` for a plain ViT.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.fx import Node

from effopt.errors import PreconditionError, UsageError
from effopt.program import Program, value, where

_ONE_SAMPLE: Mapping[str, int] = MappingProxyType({"batch": 1})

Size = Callable[[Any], int]
"""Turns one symbolic size into a number."""


def macs(program: Program, sizes: Mapping[str, int] = _ONE_SAMPLE) -> int:
    """Return the multiply-accumulates of one run of the program.

    `sizes` gives the dynamic sizes by their names in the signature; one that is not named has the
    size of the example inputs. Raises UsageError for a name that the program has not,
    PreconditionError for an operator whose sizes depend on values.
    """
    return sum(macs_by_node(program, sizes).values())


def macs_by_node(program: Program, sizes: Mapping[str, int] = _ONE_SAMPLE) -> dict[Node, int]:
    """Return the multiply-accumulates of every node, in execution order; arguments as in `macs`."""
    symbols = symbol_sizes(program, sizes)
    return {node: _node_macs(node, symbols) for node in program.nodes()}


def symbol_sizes(program: Program, sizes: Mapping[str, int] = _ONE_SAMPLE) -> dict[str, int]:
    """Return a number for every symbol of a program's sizes; arguments as in `macs`."""
    known = {**_sample_sizes(program), **sizes}
    names = set(program.dynamic.values())
    extra = sorted(set(sizes) - names - {"batch"})
    if extra:
        raise UsageError(f"the program has no dynamic size {extra[0]!r}", f"known: {sorted(names)}")
    return {symbol: known[name] for symbol, name in program.dynamic.items()}


def elements(node: Node, symbols: Mapping[str, int]) -> int:
    """Return how many numbers a node yields (its first value, where it yields several)."""
    return math.prod(_numbers(node, _reader(node, symbols)))


def node_count(program: Program) -> int:
    """Return the number of operators: nodes that are neither inputs, weights nor the output."""
    return sum(1 for node in program.nodes() if node.op.startswith("call_"))


def _sample_sizes(program: Program) -> dict[str, int]:
    pairs = zip(program.signature.inputs, program.samples, strict=True)
    sizes = (
        (s, n) for spec, tensor in pairs for s, n in zip(spec.shape, tensor.shape, strict=True)
    )
    return {name: number for name, number in sizes if isinstance(name, str)}


def _node_macs(node: Node, symbols: Mapping[str, int]) -> int:
    rule = _RULES.get(_operator(node))
    if rule is None:
        return 0

    return rule(node, _reader(node, symbols))


def _reader(node: Node, symbols: Mapping[str, int]) -> Size:
    def size(found: Any) -> int:
        return found if isinstance(found, int) else _evaluated(node, found, symbols)

    return size


def _operator(node: Node) -> str:
    """Return `aten.linear` for every overload of linear; "" for what is no operator."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if node.op == "call_function" and packet is not None else ""


def _evaluated(node: Node, found: Any, symbols: Mapping[str, int]) -> int:
    expression = found.node.expr
    numbers = {s: symbols[str(s)] for s in expression.free_symbols if str(s) in symbols}
    number = expression.subs(numbers)
    if not number.is_number:
        raise PreconditionError(
            where(node), f"its size {expression} depends on values", "count at fixed sizes"
        )
    return int(number)


def _numbers(node: Any, size: Size) -> list[int]:
    """Return the shape of the tensor that a node yields (of its first, where it yields several)."""
    val = value(node)
    first = val if isinstance(val, Tensor) else val[0]
    return [size(found) for found in first.shape]


def _product(left: int) -> Callable[[Node, Size], int]:
    """Matrix products: every output is a sum over the last axis of the left factor."""

    def rule(node: Node, size: Size) -> int:
        return math.prod(_numbers(node, size)) * _numbers(node.args[left], size)[-1]

    return rule


def _attention(node: Node, size: Size) -> int:
    """q [..., L, E], k [..., S, E], v [..., S, F]: L S E for the scores, L S F for the values."""
    query, key, val = (_numbers(arg, size) for arg in node.args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + val[-1])


def _convolution(node: Node, size: Size) -> int:
    """Every output is a sum over one filter: weight [out, in / groups, k...]."""
    weight = _numbers(node.args[1], size)
    if _operator(node) == "aten.convolution" and node.args[6]:
        return _transposed(node, size)
    return math.prod(_numbers(node, size)) * math.prod(weight[1:])


def _transposed(node: Node, size: Size) -> int:
    """Every input is spread over one filter: weight [in, out / groups, k...]."""
    weight = _numbers(node.args[1], size)
    return math.prod(_numbers(node.args[0], size)) * math.prod(weight[1:])


def _einsum(node: Node, size: Size) -> int:
    """Outputs times the sizes that are summed away; an ellipsis is never summed."""
    equation, factors = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, arrow, kept = equation.partition("->")
    sizes: dict[str, int] = {}
    for words, factor in zip(inputs.split(","), factors, strict=True):  # type: ignore[arg-type]
        shape = _numbers(factor, size)
        head, dots, tail = words.partition("...")
        sizes |= zip(head, shape, strict=False)
        sizes |= zip(reversed(tail), reversed(shape), strict=False) if dots else ()
    out = kept if arrow else "".join(c for c in sizes if inputs.count(c) == 1)
    summed = math.prod(count for letter, count in sizes.items() if letter not in out)
    return math.prod(_numbers(node, size)) * summed


_FAMILIES: tuple[tuple[tuple[str, ...], Callable[[Node, Size], int]], ...] = (
    (("linear", "matmul", "mm", "bmm", "mv", "dot", "vdot", "inner"), _product(0)),
    (("addmm", "baddbmm", "addmv", "addbmm"), _product(1)),
    (("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    (("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    (
        (
            "scaled_dot_product_attention",
            "_scaled_dot_product_attention_math",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
        ),
        _attention,
    ),
    (("einsum",), _einsum),
)

_RULES = {f"aten.{name}": rule for names, rule in _FAMILIES for name in names}
_RULES["effopt.quantized_linear"] = _product(0)  # on integers, and as many
