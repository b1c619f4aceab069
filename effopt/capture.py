"""Capture: a model becomes a Program, by torch.export, with the dimensions asked for dynamic."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from effopt.draw import example_inputs_of
from effopt.errors import CaptureError, UsageError, unknown
from effopt.functional import make_functional
from effopt.inline import inline_wrappers
from effopt.inputs import Inputs, parameter_names, read_inputs, spelled_out
from effopt.program import Program, Slots, is_tensor, where
from effopt.signature import Signature, TensorSpec
from effopt.structure import input_names, leaf_names, to_structure
from effopt.tracing import as_deployed, explained

DYNAMIC = ("batch", "length")
"""The dimensions that can be dynamic: rows of all inputs, and the token count of a text."""

DEFAULT = ("batch",)
"""What is dynamic where nothing is said; an exported program need not have it."""

_UNBOUNDED = 2**31 - 1


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: object = None,
    *,
    dynamic: Sequence[str] = ("batch",),
    seed: int = 0,
) -> Program:
    """Trace a model into a Program.

    `example_inputs` is a tensor, a tuple of positional arguments, a dict of keyword arguments or
    a pair (args, kwargs); a Hugging Face model may leave it out: inputs are drawn from its config.
    The model is traced in evaluation and returns no cache (`use_cache` of a Hugging Face config),
    and is left as it was. The graph is flat and functional: no wrapped regions, no writes in place.
    Raises UsageError for inputs that are none, CaptureError (with the source line) for a model
    that is not one graph. An exported program keeps the sizes that it was exported with;
    UsageError where it lacks one that is asked for beyond the default.
    """
    for name in dynamic:
        if name not in DYNAMIC:
            raise unknown("dynamic dimension", name, DYNAMIC)
    if isinstance(model, ExportedProgram):
        return _from_exported(model, example_inputs, dynamic)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the model is a {type(model).__name__}, not a torch module",
            "pass an nn.Module, a torch.export.ExportedProgram or a Hugging Face model",
        )
    given = example_inputs if example_inputs is not None else example_inputs_of(model, seed)
    inputs = read_inputs(given)
    if "batch" in dynamic:
        inputs = inputs.at_least_two_rows()
    names = parameter_names(model, len(inputs.args))
    return _program(_export(model, inputs, dynamic), inputs, names)


def _export(model: nn.Module, inputs: Inputs, dynamic: Sequence[str]) -> ExportedProgram:
    """Export with one named Dim for each dynamic dimension, shared by all inputs."""
    dims: dict[str, Any] = {"batch": Dim("batch", min=1)} if "batch" in dynamic else {}
    if "length" in dynamic:
        low, high = _length_range(model, inputs, dims)
        dims["length"] = Dim("length", min=low, max=high)
    return _traced(model, inputs, dims)


def _length_range(model: nn.Module, inputs: Inputs, dims: dict[str, Any]) -> tuple[int, int | None]:
    """Ask torch.export which lengths the model takes: a position table, for one, bounds them."""
    if inputs.length is None:
        raise UsageError(
            "dynamic length was asked for, but no input is a [batch, length] table of token ids "
            "or [batch, length, channels]",
            "leave 'length' out of dynamic, or pass integer token ids as an example input",
        )
    exported = _traced(model, inputs, {**dims, "length": Dim.DYNAMIC})
    given = set(exported.graph_signature.user_inputs)
    _, ranges = _symbols(exported, [node for node in exported.graph.nodes if node.name in given])
    if "length" not in ranges:
        raise CaptureError(
            "the model fixes its sequence length while it is traced",
            "leave 'length' out of dynamic",
        )
    low, high = ranges["length"]
    return low, None if high == _UNBOUNDED else high


def _traced(model: nn.Module, inputs: Inputs, dims: dict[str, Any]) -> ExportedProgram:
    with as_deployed(model), explained(model), spelled_out(model, inputs) as as_:
        shapes = inputs.dynamic_shapes(as_, dims)
        return torch.export.export(
            model, inputs.args, inputs.kwargs or None, dynamic_shapes=shapes, strict=False
        )


def _from_exported(
    exported: ExportedProgram, example_inputs: object, dynamic: Sequence[str]
) -> Program:
    """Take a program that the user exported: its own dynamic dimensions stand."""
    given = example_inputs if example_inputs is not None else exported.example_inputs
    if given is None:
        raise UsageError("the exported program holds no example inputs", "pass example_inputs")
    program = _program(exported, read_inputs(given), None)
    lacking = [name for name in dynamic if name not in program.dynamic.values()]
    if lacking and tuple(dynamic) != DEFAULT:
        raise UsageError(
            f"the exported program fixes its {lacking[0]}, which dynamic asks for",
            f"export it with a Dim for {lacking[0]}, or leave {lacking[0]!r} out of dynamic",
        )
    return program


def _program(exported: ExportedProgram, inputs: Inputs, parameters: list[str] | None) -> Program:
    """Flatten the exported module: tensors in, tensors out, no guards, no nesting.

    `parameters` names the positional inputs; None takes the names in the exported program.
    """
    nested = exported.module(check_guards=False)
    assert isinstance(nested, torch.fx.GraphModule)
    inline_wrappers(nested)
    graph = nested.graph
    info: Any = getattr(graph._codegen, "pytree_info")  # noqa: B009 - of export's own code generator
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    constants = [node for node in placeholders if not isinstance(node.meta["val"], Tensor)]
    tensors = [node for node in placeholders if node not in constants]
    known = [n.name for n in placeholders] if parameters is None else None
    given = known or input_names(info.in_spec, parameters or [])
    inputs_named = [name for name, n in zip(given, placeholders, strict=True) if n in tensors]
    fixed = _fixed(graph, placeholders, given)
    graph.set_codegen(torch.fx.graph.CodeGen())
    names, slots = _flat_outputs(graph, info.out_spec)
    dynamic, ranges = _symbols(exported, tensors)
    last = next(reversed(graph.nodes))
    signature = Signature(
        tuple(
            _spec(name, node.meta["val"], dynamic)
            for name, node in zip(inputs_named, tensors, strict=True)
        ),
        tuple(_spec(n, o.meta["val"], dynamic) for n, o in zip(names, last.args[0], strict=True)),
        to_structure(info.out_spec, slots),
    )
    flat = torch.fx.GraphModule(nested, graph)
    program = Program(
        *(flat, signature, (), info.in_spec, info.out_spec, slots, dynamic, ranges),
        constants=fixed,
    )
    _check_operators(program)
    program = replace(program, samples=program.flatten(inputs.args, inputs.kwargs))
    make_functional(program)
    return program


def _fixed(
    graph: torch.fx.Graph, placeholders: list[Node], names: list[str]
) -> dict[int, tuple[str, Any]]:
    """Take the inputs that are no tensors out of the graph: their values are part of it."""
    fixed: dict[int, tuple[str, Any]] = {}
    for place, (node, name) in enumerate(zip(placeholders, names, strict=True)):
        if isinstance(node.meta["val"], Tensor):
            continue
        if node.users:
            raise CaptureError(
                f"the input {name!r} is a number that stays free", "export it as a fixed number"
            )
        fixed[place] = (name, node.meta["val"])
        graph.erase_node(node)
    return fixed


def _check_operators(program: Program) -> None:
    """Refuse what is no ATen operator, such as torch.cond, whose branches are graphs."""
    from effopt.verify import SIZE_OPERATORS

    odd = [
        node
        for node in program.nodes()
        if node.op not in ("placeholder", "get_attr", "output")
        and not isinstance(node.target, torch._ops.OpOverload)
        and node.target not in SIZE_OPERATORS
    ]
    odd += [node for node in program.nodes() if node.op == "get_attr" and not is_tensor(node)]
    if odd:
        raise CaptureError(
            f"{where(odd[0])} is no ATen operator: the graph cannot hold it",
            "write it in plain tensor operations, such as torch.where for torch.cond",
        )


def _flat_outputs(graph: torch.fx.Graph, spec: pytree.TreeSpec) -> tuple[list[str], Slots]:
    """Keep the tensors among the outputs: their names, and which leaf of the nesting is which."""
    output = next(reversed(graph.nodes))
    leaves = list(pytree.tree_leaves(output.args[0]))
    odd = [
        f"{leaf.meta['val'] if isinstance(leaf, Node) else repr(leaf)} as {name!r}"
        for name, leaf in zip(leaf_names(spec), leaves, strict=True)
        if leaf is not None and not is_tensor(leaf)
    ]
    if odd or not any(leaf is not None for leaf in leaves):
        raise CaptureError(
            f"the model returns {odd[0] if odd else None}, which is no tensor",
            "return tensors only; a module around the model can leave the rest out",
        )
    names = [n for n, leaf in zip(leaf_names(spec), leaves, strict=True) if leaf is not None]
    output.args = (tuple(leaf for leaf in leaves if leaf is not None),)
    count = iter(range(len(names)))
    return names, tuple(None if leaf is None else next(count) for leaf in leaves)


def _symbols(
    exported: ExportedProgram, inputs: list[Node]
) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Name each symbolic size: the first dimension of an input is `batch`, the second `length`."""
    names: dict[str, str] = {}
    ranges: dict[str, tuple[int, int]] = {}
    for node in inputs:
        for place, size in enumerate(node.meta["val"].shape):
            symbol = str(size)
            if isinstance(size, int) or symbol in names:
                continue
            wish = DYNAMIC[place] if place < len(DYNAMIC) else f"size{place}"
            names[symbol] = wish if wish not in names.values() else f"{node.name}_{place}"
            found = exported.range_constraints[size.node.expr]
            bounded = found.upper.is_number and found.upper < _UNBOUNDED
            upper = int(found.upper) if bounded else _UNBOUNDED
            ranges[names[symbol]] = (int(found.lower), upper)
    return names, ranges


def _spec(name: str, val: Tensor, dynamic: dict[str, str]) -> TensorSpec:
    shape = tuple(s if isinstance(s, int) else dynamic.get(str(s), str(s)) for s in val.shape)
    return TensorSpec(name, str(val.dtype).removeprefix("torch."), shape, name)
