"""Edit: the only way to change a graph. Every new node gets its value and the name of its maker."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import Argument, map_arg

from effopt.axes import same_size
from effopt.errors import VerificationError
from effopt.program import Program, where

MAKER = "effopt.maker"
"""Key in `node.meta`: which pass made or changed the node, and why."""

Target = Callable[..., Any]


class Edit:
    """A change of one program by one maker; close it to drop dead nodes and recompile.

    `count` says how many nodes were made, changed or replaced; 0 leaves the graph as it was.
    """

    def __init__(self, program: Program, by: str) -> None:
        self.program = program
        self.by = by
        self.count = 0
        self.graph = program.module.graph

    @contextmanager
    def before(self, node: Node) -> Iterator[None]:
        """Insert new nodes ahead of `node`."""
        with self.graph.inserting_before(node):
            yield

    @contextmanager
    def after(self, node: Node) -> Iterator[None]:
        """Insert new nodes behind `node`, in the order in which they are made."""
        with self.graph.inserting_before(node.next):
            yield

    def call(
        self, target: Target, *args: Argument, name: str | None = None, **kwargs: Argument
    ) -> Node:
        """Make a node; its value is inferred, so a wrong shape is an error here and now."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta[MAKER] = self.by
        node.meta["val"] = infer(node, self.program)
        self.count += 1
        return node

    def item(self, node: Node, place: int, name: str | None = None) -> Node:
        """Take one result of a node that yields several."""
        import operator

        return self.call(operator.getitem, node, place, name=name)

    def constant(self, name: str, tensor: Tensor) -> Node:
        """Add a constant to the module and return the node that reads it."""
        path, module = name, self.program.module
        while hasattr(module, path):
            path += "_"
        module.register_buffer(path, tensor, persistent=False)
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.create_node("get_attr", path, name=path)
        node.meta = {
            "val": fake_mode(self.program).from_tensor(tensor, static_shapes=True),
            MAKER: self.by,
        }
        self.count += 1
        return node

    def update(self, node: Node, *args: Argument, **kwargs: Argument) -> None:
        """Give a node new arguments and infer its value anew."""
        node.args, node.kwargs = args, kwargs
        node.meta[MAKER] = self.by
        node.meta["val"] = infer(node, self.program)
        self.count += 1

    def retarget(self, node: Node, target: Target, *args: Argument, **kwargs: Argument) -> None:
        """Make another operator of a node, which keeps its name and place."""
        node.target = target
        self.update(node, *args, **kwargs)

    def replace(self, old: Node, new: Node) -> None:
        """Let every reader of `old` read `new`, of the same shape and dtype, and drop `old`."""
        before, after = old.meta.get("val"), new.meta.get("val")
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            same = before.ndim == after.ndim and before.dtype == after.dtype
            if not same or not all(map(same_size, before.shape, after.shape)):
                reason = f"{new.name} does not have the shape and dtype of what it stands for"
                raise VerificationError(f"{where(old)}: {reason}")
        for key in ("nn_module_stack", "stack_trace"):
            if key in old.meta and key not in new.meta and new.op == "call_function":
                new.meta[key] = old.meta[key]
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
        self.count += 1

    def erase(self, node: Node) -> None:
        """Drop a node that nothing reads, such as a check made while tracing."""
        self.graph.erase_node(node)
        self.count += 1

    def close(self) -> bool:
        """Drop dead nodes, recompile if something changed, and say whether it did."""
        if self.count:
            self.graph.eliminate_dead_code()
            self.program.module.delete_all_unused_submodules()
            self.program.module.recompile()
            self.program.changed()
        return self.count > 0


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
    mode = fake_mode(program)
    env = mode.shape_env
    guards = len(env.guards) if env is not None else 0
    known = _knowledge(env)
    args, kwargs = map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
    assert callable(node.target)
    try:
        with _uncached(mode), mode, torch.no_grad():
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
