"""The verifier: what must hold after every pass that changed something."""

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import Size, find_axes, same_size
from effopt.errors import VerificationError
from effopt.infer import infer, is_free_of_inputs
from effopt.program import Program, value, where

SIZE_OPERATORS = (
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.getitem),
    *(operator.truediv, operator.neg, operator.mod, operator.pow, operator.eq, operator.ge),
    *(operator.le, operator.gt, operator.lt, torch.sym_min, torch.sym_max, torch.sym_ite),
    *(torch.sym_sum, torch.sym_float, torch.sym_int, torch.sym_not),
)
"""Plain functions that may stand in a graph: arithmetic of sizes."""


def verify(program: Program, by: str) -> None:
    """Check a program; raises VerificationError that names the pass, the node and the rule.

    The graph is well formed, every node's shape and dtype are what its arguments give, no size
    was fixed, every operator is allowed, and no tensor mixes tokens from before and after a
    reduction.
    """
    try:
        program.module.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"after {by}: {error}", REPORT) from error
    for node in program.nodes():
        for rule in RULES:
            if reason := rule(node, program):
                raise VerificationError(f"after {by}: {where(node)}: {reason}", REPORT)
    if reason := _outputs_differ(program):
        raise VerificationError(f"after {by}: {reason}", REPORT)
    for node, reason in program.get(find_axes).mixed.items():
        raise VerificationError(f"after {by}: {where(node)}: {reason}", REPORT)


REPORT = "this is a defect of the pass: please report it"


def _outputs_differ(program: Program) -> str:
    """Say which output no longer has the shape or dtype that the signature promises."""
    (outputs,) = program.output().args
    assert isinstance(outputs, (tuple, list))
    for spec, node in zip(program.signature.outputs, outputs, strict=True):
        assert isinstance(node, Node)
        val = value(node)
        shape = tuple(s if isinstance(s, int) else program.name_of(s) for s in val.shape)
        dtype = str(val.dtype).removeprefix("torch.")
        if (shape, dtype) != (spec.shape, spec.dtype):
            return (
                f"output {spec.name!r} is {dtype} {list(shape)}, "
                f"not {spec.dtype} {list(spec.shape)}"
            )
    return ""


def _operator_allowed(node: Node, program: Program) -> str:
    if node.op in ("placeholder", "get_attr", "output"):
        return ""
    if node.op != "call_function":
        return f"{node.op} has no place in a program"
    if isinstance(node.target, torch._ops.OpOverload):
        mutable = node.target._schema.is_mutable
        return f"{node.target} changes its argument in place" if mutable else ""
    return "" if node.target in SIZE_OPERATORS else f"{node.target} is no ATen operator"


def _value_holds(node: Node, program: Program) -> str:
    if node.op != "call_function":
        return "" if node.op == "output" or "val" in node.meta else "it has no value"
    if "val" not in node.meta:
        return "it has no value"
    return _difference(node.meta["val"], infer(node, program))


def _same_or_free(noted: Size, found: Size) -> bool:
    """Tell whether sizes are equal; one that depends on data has another name each time."""
    return same_size(noted, found) or (is_free_of_inputs(noted) and is_free_of_inputs(found))


def _difference(noted: object, found: object) -> str:
    """Say how a noted value differs from the inferred one, "" if it does not."""
    if isinstance(noted, (tuple, list)) and isinstance(found, (tuple, list)):
        pairs = zip(noted, found, strict=True)
        return next((text for a, b in pairs if (text := _difference(a, b))), "")
    if not isinstance(noted, Tensor) or not isinstance(found, Tensor):
        return ""
    same = noted.ndim == found.ndim and all(map(_same_or_free, noted.shape, found.shape))
    if not same:
        return f"its shape is {list(found.shape)}, noted as {list(noted.shape)}"
    return "" if noted.dtype == found.dtype else f"its dtype is {found.dtype}, not {noted.dtype}"


RULES: tuple[Callable[[Node, Program], str], ...] = (_operator_allowed, _value_holds)
"""Each says what is wrong with a node, or ""."""
