"""Infer: the value (shape and dtype) of a node from those of its arguments, without a guard.

Operators run on fake tensors, a millisecond or more each where the batch is a symbol. What was
inferred once for the same shapes is kept, and frequent operators have rules (`shape_rules`).
"""

import itertools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from effopt.errors import VerificationError
from effopt.program import Program, where
from effopt.shape_rules import RULES


def fake_mode(program: Program) -> FakeTensorMode:
    """Return the mode that the program was traced under; it owns the symbols."""
    first = next(node for node in program.nodes() if node.op == "placeholder")
    mode = detect_fake_mode([first.meta["val"]])
    assert mode is not None, "a captured program has fake inputs"
    return mode


def infer(node: Node, program: Program) -> Any:
    """Run a node on the values of its arguments and return its value.

    Raises VerificationError where the operator does not take them, or where it would fix a
    symbolic size (a guard that the caller's batch would have to meet).
    """
    given: Any = map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
    args, kwargs = given
    key = _key(node.target, args, kwargs)
    if key in program.inferred:
        return program.inferred[key]
    val = _by_rule(node.target, args, kwargs, fake_mode(program))
    if val is None:
        val = _run(node, program, args, kwargs)
    if not depends_on_data(val):
        program.inferred[key] = val
    return val


def _by_rule(target: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """Return the value of a call that needs no run: one of several results, or by a rule."""
    if target is operator.getitem and isinstance(args[0], (list, tuple)):
        return args[0][args[1]] if -len(args[0]) <= args[1] < len(args[0]) else None
    layout = RULES[target](*args) if target in RULES and not kwargs else None
    if layout is None:
        return None
    plain = torch.empty_strided(*layout, dtype=args[0].dtype, device="meta")
    return FakeTensor(mode, plain, args[0].device)


def depends_on_data(val: Any) -> bool:
    """Tell whether a value has sizes that only the data of a run says: each has its own."""
    leaves = pytree.tree_leaves(val)
    sizes = [size for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape]
    own = [leaf for leaf in leaves if isinstance(leaf, torch.SymInt)]
    return any(map(is_free_of_inputs, (*sizes, *own)))


def is_free_of_inputs(size: Any) -> bool:
    """Tell whether a size is one that no input has, such as a number of places that are true."""
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def _key(target: Any, args: Any, kwargs: Any) -> Any:
    """Return what a value follows from: shapes, strides, dtypes, and all that is no tensor."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return target, spec, tuple(map(_described, leaves))


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        sizes = tuple(map(_described, (*leaf.shape, *leaf.stride())))
        return leaf.dtype, leaf.device, leaf.ndim, sizes
    if isinstance(leaf, torch.SymInt):
        return leaf.node.expr
    return type(leaf), leaf if leaf == leaf else str(leaf)


def _run(node: Node, program: Program, args: Any, kwargs: Any) -> Any:
    mode = fake_mode(program)
    env = mode.shape_env
    guards = len(env.guards) if env is not None else 0
    known = _knowledge(env)
    assert callable(node.target)
    try:
        # Without the Python dispatcher, composite operators read sizes as numbers and so fix them.
        with _uncached(mode), enable_python_dispatcher(), mode, torch.no_grad():
            val = node.target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        _forget(env, known)
        first = str(error).strip().splitlines()[0]
        raise VerificationError(f"{where(node)}: does not fit its arguments: {first}") from error
    added = [guard.expr for guard in env.guards[guards:]] if env is not None else []
    narrowing = [expr for expr in added if not _holds_always(expr, env)]
    if narrowing:
        _forget(env, known)
        shown = ", ".join(map(str, narrowing))
        raise VerificationError(f"{where(node)}: fixes a size that must stay free: {shown}")
    return val


@contextmanager
def _uncached(mode: FakeTensorMode) -> Iterator[None]:
    """Let every node be inferred anew: a cached answer records no guard."""
    before, mode.cache_enabled = mode.cache_enabled, False
    try:
        yield
    finally:
        mode.cache_enabled = before


_LEARNT = ("replacements", "axioms", "var_to_range", "specialization_stacks")
"""What a shape environment learns from a guard, as dicts."""


def _knowledge(env: Any) -> dict[str, Any]:
    """Copy what a shape environment knows."""
    return (
        {}
        if env is None
        else {"guards": list(env.guards)} | {name: dict(getattr(env, name)) for name in _LEARNT}
    )


def _forget(env: Any, known: dict[str, Any]) -> None:
    """Take back what a refused node taught the shape environment, which all forks share."""
    if env is None:
        return
    env.guards[:] = known["guards"]
    for name in _LEARNT:
        held = getattr(env, name)
        held.clear()
        held.update(known[name])
    # Sizes and conditions remember what they were evaluated to until these counters move.
    env._replacements_version_counter += 1
    env._version_counter += 1
    # Answers are kept by the condition asked: one that was taken back must be asked anew.
    type(env)._inner_evaluate_expr.cache_clear()


def _holds_always(guard: Any, env: Any) -> bool:
    """Tell whether a condition on sizes holds for all that the program takes.

    Strides of computed lengths give conditions such as K = max(1, K) that hold but that the
    shape environment cannot prove. They are tried on a grid: a few batches and many lengths.
    """
    symbols = sorted(guard.free_symbols, key=str)
    grid = itertools.product(*(_tried(env.var_to_range[symbol]) for symbol in symbols))
    return all(
        guard.xreplace({s: sympy.Integer(n) for s, n in zip(symbols, sizes, strict=True)})
        == sympy.true
        for sizes in grid
    )


def _tried(sizes: Any) -> list[int]:
    """Choose sizes to try: the first few, which are where such conditions fail, and large ones."""
    low, high = int(sizes.lower), sizes.upper
    end = int(high) if high.is_Integer and high < low + _MANY else low + _MANY
    return sorted({*range(low, min(low + 9, end + 1)), (low + end) // 2, end - 1, end})


_MANY = 4096
