"""Program: a captured model as an ATen graph that passes rewrite and backends lower."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.utils import _pytree as pytree

from effopt.errors import UsageError
from effopt.signature import Signature

if TYPE_CHECKING:
    from effopt.calibration import Calibration
    from effopt.promise import Promise
    from effopt.target import Target

Slots = tuple[int | None, ...]
"""For each leaf of the model's nested output: its place among the outputs, None for a None."""

T = TypeVar("T")
Analysis = Callable[["Program"], T]
"""A pure function of a program; `Program.get` keeps its value until the graph changes."""


@dataclass(eq=False)
class Program:
    """One model as one flat graph.

    `module` takes the input tensors in the order of `signature.inputs` and returns a flat tuple
    in the order of `signature.outputs`. Every node has a FakeTensor (or a symbolic size) in
    `meta["val"]`. Only `effopt.edit.Edit` changes the graph.

    `samples` are example inputs (flat, as captured); `dynamic` maps the name of each symbol of
    the graph to the name that the signature uses for it (`{"s77": "batch"}`), `ranges` gives
    the sizes that a name stands for. `history` holds the specs of the passes that changed it,
    `constants` the name and value of each leaf of the inputs that is no tensor, by its place;
    `inferred` keeps values by what they follow from, for all forks (see `effopt.infer`), and
    `calibration` is the user's data, for all forks, where some were given; `target` the machine
    that the program is optimised for, where that is known; `promise` what was promised of the
    exits of this very graph, where they were calibrated.
    """

    module: GraphModule
    signature: Signature
    samples: tuple[Tensor, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    slots: Slots
    dynamic: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    history: tuple[str, ...] = ()
    constants: dict[int, tuple[str, Any]] = field(default_factory=dict)
    inferred: dict[Any, Any] = field(default_factory=dict, repr=False)
    calibration: "Calibration | None" = field(default=None, repr=False)
    target: "Target | None" = None
    promise: "Promise | None" = field(default=None, repr=False)
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph in eager torch on the model's own arguments; returns what it does."""
        flat = self.flatten(args, kwargs)
        with torch.no_grad():
            outputs = self.module(*flat)
        leaves = [None if slot is None else outputs[slot] for slot in self.slots]
        return pytree.tree_unflatten(leaves, self.out_spec)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Turn the model's arguments into the flat input tensors; UsageError where they differ."""
        order = pytree.tree_unflatten(list(range(self.in_spec.num_leaves)), self.in_spec)[1]
        known = {key: kwargs[key] for key in order if key in kwargs}
        if len(known) == len(kwargs):
            leaves, spec = pytree.tree_flatten((args, known))
            if spec == self.in_spec:
                self._check_leaves(leaves)
                tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
                self._check_ranges(tensors)
                return tensors
        names = ", ".join(item.name for item in self.signature.inputs)
        raise UsageError(
            f"the inputs do not nest as at capture (inputs: {names})",
            "pass the same positional and keyword arguments as the example inputs",
        )

    def _check_leaves(self, leaves: list[Any]) -> None:
        """Refuse another value than at capture where the graph holds the value."""
        names = iter(item.name for item in self.signature.inputs)
        for place, leaf in enumerate(leaves):
            if place not in self.constants:
                name = next(names)
                if not isinstance(leaf, Tensor):
                    kind = type(leaf).__name__
                    raise UsageError(f"input {name!r} is a {kind}", "pass a tensor, as at capture")
                continue
            name, fixed = self.constants[place]
            if type(leaf) is not type(fixed) or leaf != fixed:
                raise UsageError(
                    f"{name} was {fixed!r} at capture, which the graph holds",
                    f"pass {name}={fixed!r}, or capture the model again with the other value",
                )

    def _check_ranges(self, tensors: tuple[Tensor, ...]) -> None:
        """Refuse a size that the program was not captured for."""
        for spec, tensor in zip(self.signature.inputs, tensors, strict=True):
            for name, size in zip(spec.shape, tensor.shape, strict=False):
                low, high = self.ranges.get(str(name), (size, size))
                if not low <= size <= high:
                    raise UsageError(
                        f"{name} of input {spec.name!r} is {size}, not from {low} to {high}",
                        "pass inputs of the sizes that the model was captured for",
                    )

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the graph in eager torch on flat inputs."""
        with torch.no_grad():
            return tuple(self.module(*inputs))

    def get(self, analysis: Analysis[T]) -> T:
        """Return the value of an analysis, computed at most once for each state of the graph."""
        if analysis not in self._known:
            self._known[analysis] = analysis(self)
        value: T = self._known[analysis]
        return value

    def changed(self) -> None:
        """Forget every analysis; `Edit` calls this."""
        self._known.clear()

    def fork(self) -> "Program":
        """Copy the graph, share the weights: a pass works on a fork, kept if it is right.

        A fork is compiled when it runs, or by `compile`: most are rewritten again before that.
        """
        graph = torch.fx.Graph()
        result = graph.graph_copy(self.module.graph, seen := dict[Node, Node]())
        for old, new in seen.items():
            new.meta = copy.copy(old.meta)
        graph.output(result)
        last = next(reversed(graph.nodes))
        last.meta = copy.copy(next(reversed(self.module.graph.nodes)).meta)
        return replace(self, module=LazyGraphModule(self.module, graph), _known={})

    def compile(self) -> None:
        """Write the graph as the code of `module`, for tools that read its signature."""
        LazyGraphModule.force_recompile(self.module)

    def nodes(self) -> Iterator[Node]:
        """Iterate over the nodes in execution order."""
        return iter(self.module.graph.nodes)

    def inputs(self) -> list[Node]:
        """Return the placeholders in order."""
        return [node for node in self.nodes() if node.op == "placeholder"]

    def output(self) -> Node:
        """Return the output node; its one argument is the flat tuple of outputs."""
        last: Node = next(reversed(self.module.graph.nodes))
        return last

    def weight(self, node: Node) -> Tensor:
        """Return the tensor behind a `get_attr` node."""
        owner, _, leaf = str(node.target).rpartition(".")
        value = getattr(self.module.get_submodule(owner), leaf)
        assert isinstance(value, Tensor), f"{node.target} is no tensor"
        return value

    def weight_bytes(self) -> int:
        """Return the bytes of all distinct weights and constants."""
        tensors = {id(t): t for n in self.nodes() if n.op == "get_attr" for t in [self.weight(n)]}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def name_of(self, size: Any) -> Any:
        """Return the signature's name of a symbolic size, or its expression as text."""
        return self.dynamic.get(str(size), str(size))

    def text(self) -> str:
        """Write the graph as text, a line a node: `add[s77, 5, 8] = add(x, @bias)`."""
        return "\n".join(_line(node) for node in self.nodes() if node.op != "get_attr")


def value(node: Node) -> Any:
    """Return what the node yields: a FakeTensor, a size, or a tuple of them."""
    return node.meta.get("val")


def shape(node: Node) -> tuple[Any, ...]:
    """Return the (possibly symbolic) shape of the tensor that a node yields."""
    val = value(node)
    assert isinstance(val, Tensor), f"{node.name} yields no tensor"
    return tuple(val.shape)


def is_tensor(node: object) -> TypeGuard[Node]:
    """Tell whether an argument is a node that yields a tensor."""
    return isinstance(node, Node) and isinstance(value(node), Tensor)


def module_path(node: Node) -> str:
    """Return the path of the module that a node comes from, or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    return str([*stack.values()][-1][0]) if stack else ""


def source_line(node: Node) -> str:
    """Return `file:line` of the model's code that made the node, or "".

    A file is named below its packages or the current folder, else with the folder that it is in:
    reasons are written into reports, which tell nothing of the machine that made them.
    """
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    places = [line.strip() for line in lines if line.strip().startswith("File ")]
    places = [place for place in places if not place.startswith('File "<')]  # made at run time
    if not places:
        return ""
    parts = places[-1].split(", ")
    return f"{_short(Path(parts[0][5:].strip(chr(34))))}:{parts[1].removeprefix('line ')}"


def _short(path: Path) -> str:
    for place, part in enumerate(path.parts):
        if part in ("site-packages", "dist-packages"):
            return "/".join(path.parts[place + 1 :])
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else "/".join(path.parts[-2:])


def where(node: Node) -> str:
    """Name the place of a node for an error: its name, operator, module path and source line."""
    operator = (
        getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function"
        else node.op
    )
    path, line = module_path(node), source_line(node)
    inside = f" in {path}" if path else ""
    return f"{node.name} ({operator}){inside}" + (f" at {line}" if line else "")


@dataclass(frozen=True)
class Place:
    """What `where` says, in its parts: the node, its operator, module path and source line."""

    node: str = ""
    operator: str = ""
    path: str = ""
    source: str = ""


_WHERE = re.compile(
    r"(?P<node>\S+?)(?: \((?P<operator>.+?)\))?(?: in (?P<path>\S+))?(?: at (?P<source>.+:\d+))?"
)


def place_of(text: str) -> Place:
    """Read a place that `where` wrote; any other text is all in `node`."""
    found = _WHERE.fullmatch(text)
    return Place(**found.groupdict(default="")) if found else Place(text)


def _line(node: Node) -> str:
    if node.op == "placeholder":
        return f"{node.name}{_shape_text(node)}"
    if node.op == "output":
        return f"return {', '.join(_text(arg) for arg in node.args[0])}"  # type: ignore[union-attr]
    packet = getattr(node.target, "overloadpacket", node.target)
    operator = getattr(packet, "__name__", str(packet))
    words = [_text(arg) for arg in node.args]
    words += [f"{key}={_text(arg)}" for key, arg in node.kwargs.items()]
    return f"{node.name}{_shape_text(node)} = {operator}({', '.join(words)})"


def _shape_text(node: Node) -> str:
    val = value(node)
    return f"[{', '.join(str(size) for size in val.shape)}]" if isinstance(val, Tensor) else ""


def _text(arg: Any) -> str:
    if isinstance(arg, Node):
        return f"@{arg.target}" if arg.op == "get_attr" else arg.name
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(_text(item) for item in arg)}]"
    return str(arg)
