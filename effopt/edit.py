"""Edit: the only way to change a graph. Every new node gets its value and the name of its maker."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument
from torch.utils import _pytree as pytree

from effopt.axes import same_sizes
from effopt.errors import VerificationError
from effopt.infer import fake_mode, infer
from effopt.program import Program, where
from effopt.signature import Signature

MAKER = "effopt.maker"
"""Key in `node.meta`: which pass made or changed the node, and why."""

Target = Callable[..., Any]


class Edit:
    """A change of one program by one maker; close it to drop dead nodes.

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

    @contextmanager
    def attempt(self, node: Node) -> Iterator[None]:
        """Insert new nodes ahead of `node`; an error takes them back, and their count, and goes on.

        What an attempt changes or replaces stays so: it does that last, where nothing can fail.
        """
        before, count = node.prev, self.count
        try:
            with self.before(node):
                yield
        except Exception:
            while node.prev is not before:
                self.graph.erase_node(node.prev)
            self.count = count
            raise

    def call(
        self, target: Target, *args: Argument, name: str | None = None, **kwargs: Argument
    ) -> Node:
        """Make a node; its value is inferred, so a wrong shape is an error here and now."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        self._infer(node)
        return node

    def copy(self, node: Node) -> Node:
        """Make a second node that yields what `node` does."""
        made = self.graph.node_copy(node, lambda source: source)
        made.meta[MAKER] = self.by
        self.count += 1
        return made

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
        self._infer(node)

    def retarget(self, node: Node, target: Target, *args: Argument, **kwargs: Argument) -> None:
        """Make another operator of a node, which keeps its name and place."""
        node.target = target
        self.update(node, *args, **kwargs)

    def replace(self, old: Node, new: Node) -> None:
        """Let every reader of `old` read `new`, of the same shape and dtype, and drop `old`."""
        before, after = old.meta.get("val"), new.meta.get("val")
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            same = before.dtype == after.dtype and same_sizes(before.shape, after.shape)
            if not same:
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

    def _infer(self, node: Node) -> None:
        node.meta[MAKER] = self.by
        node.meta["val"] = infer(node, self.program)
        self.count += 1

    def outputs(self, nodes: Sequence[Node], signature: Signature) -> None:
        """Let the program return `nodes`, which are the outputs of `signature`, in order.

        What it returns in eager torch nests as the signature says, in plain dicts and tuples.
        """
        output, program = self.program.output(), self.program
        output.args = (tuple(nodes),)
        output.meta["val"] = tuple(node.meta["val"] for node in nodes)
        program.signature = signature
        leaves, program.out_spec = pytree.tree_flatten(
            program.signature.nest(range(len(program.signature.outputs)))
        )
        program.slots = tuple(leaves)
        self.count += 1

    def close(self) -> bool:
        """Drop dead nodes if something changed, and say whether it did."""
        if self.count:
            self.graph.eliminate_dead_code(_is_kept)
            self.program.module.delete_all_unused_submodules()
            self.program.module.recompile()
            self.program.changed()
        return self.count > 0


def _is_kept(node: Node) -> bool:
    """Tell whether a node stays without readers; torch keeps attention too, which may be random."""
    return node.op in ("placeholder", "output")
