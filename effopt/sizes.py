"""Small integer expressions as text: one spelling of sizes and launches for every form of a plugin.

`N - r` or `cdiv(B * K * C, 256)` is evaluated on numbers, on symbolic sizes of a trace or of
TensorRT's shape algebra, and written as C++. Nothing but names, integers, `+ - * //` and the
functions below is taken, so that every form means the same.
"""

import ast
import functools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Size = Any
"""A number, a SymInt of torch, or a symbolic size of TensorRT: what has + - * and //."""


def cdiv(value: Size, by: Size) -> Size:
    """Return value / by, rounded up."""
    return (value + by - 1) // by


def bits(value: float) -> int:
    """Return a float32 as the int32 of the same bits: kernels take no other scalars than int32."""
    (found,) = struct.unpack("<i", struct.pack("<f", value))
    return int(found)


@dataclass(frozen=True)
class Algebra:
    """What expressions are made of: how a number becomes a size, and the functions."""

    number: Callable[[int], Size]
    functions: Mapping[str, Callable[..., Size]]


NUMBERS = Algebra(int, MappingProxyType({"cdiv": cdiv, "bits": bits}))
"""Sizes that are numbers, or take numbers on either side."""

_OPERATORS: Mapping[type[ast.operator], tuple[Callable[[Size, Size], Size], str]] = (
    MappingProxyType({
        ast.Add: (lambda a, b: a + b, "+"),
        ast.Sub: (lambda a, b: a - b, "-"),
        ast.Mult: (lambda a, b: a * b, "*"),
        ast.FloorDiv: (lambda a, b: a // b, "/"),
    })
)  # fmt: skip


def evaluate(text: str, known: Mapping[str, Size], algebra: Algebra = NUMBERS) -> Size:
    """Return the value of an expression.

    Raises ValueError for what is no such expression, KeyError for an unknown name.
    """
    return _value(_parse(text), known, algebra)


def names(text: str) -> frozenset[str]:
    """Return the sizes and attributes that an expression reads."""
    nodes = [node for node in ast.walk(_parse(text)) if isinstance(node, ast.Name)]
    return frozenset(node.id for node in nodes) - set(NUMBERS.functions)


def cpp(text: str) -> str:
    """Write an expression in C++, where `cdiv` and `bits` are functions of the same names."""
    return _cpp(_parse(text))


@functools.cache
def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no expression of sizes") from error


def _value(node: ast.expr, known: Mapping[str, Size], algebra: Algebra) -> Size:
    match node:
        case ast.Constant(value=int(number)):
            return algebra.number(number)
        case ast.Name(id=name):
            return known[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            apply, _ = _OPERATORS[type(op)]
            return apply(_value(left, known, algebra), _value(right, known, algebra))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in algebra.functions:
            return algebra.functions[name](*(_value(arg, known, algebra) for arg in args))
    raise ValueError(f"{ast.unparse(node)!r} is no expression of sizes")


def _cpp(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=int(number)):
            return str(number)
        case ast.Name(id=name):
            return name
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return f"({_cpp(left)} {_OPERATORS[type(op)][1]} {_cpp(right)})"
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in NUMBERS.functions:
            return f"{name}({', '.join(map(_cpp, args))})"
    raise ValueError(f"{ast.unparse(node)!r} is no expression of sizes")
