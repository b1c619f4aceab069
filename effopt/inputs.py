"""Example inputs, as the user gives them: arguments of forward, and what counts rows in them."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effopt.errors import UsageError

FORMS = "pass a tensor, a tuple of positional or a dict of keyword arguments, or (args, kwargs)"


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments, with the sizes that count rows and tokens in them.

    `of_table` says that a table of integers gave the length: then floating values with channels
    (features of an image beside a text) do not have it, even if the sizes agree.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int | None
    length: int | None
    of_table: bool = True

    def leaves(self) -> list[Any]:
        """Return all leaves in the order in which torch.export takes them."""
        return list(pytree.tree_leaves((self.args, self.kwargs)))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors among the leaves."""
        return tuple(leaf for leaf in self.leaves() if isinstance(leaf, Tensor))

    def at_least_two_rows(self) -> "Inputs":
        """Repeat a batch of one: torch.export would take size 1 for a constant."""
        if self.batch != 1:
            return self
        doubled = pytree.tree_map_only(Tensor, self._twice, (self.args, self.kwargs))
        return replace(self, args=doubled[0], kwargs=doubled[1], batch=2)

    def dynamic_shapes(
        self, signature: inspect.Signature, dims: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return torch.export's `dynamic_shapes`: which dimension of each leaf is which Dim.

        It nests as the arguments do when `forward` takes them: TypeError where it would not.
        """

        def of_leaf(leaf: Any) -> dict[int, Any] | None:
            if not isinstance(leaf, Tensor):
                return None
            found = {0: dims["batch"]} if "batch" in dims and self._has_batch(leaf) else {}
            if "length" in dims and self._has_length(leaf):
                found[1] = dims["length"]
            return found

        bound = signature.bind(*self.args, **self.kwargs).arguments
        return {name: pytree.tree_map(of_leaf, given) for name, given in bound.items()}

    def _twice(self, leaf: Tensor) -> Tensor:
        return torch.cat([leaf, leaf]) if self._has_batch(leaf) else leaf

    def _has_batch(self, leaf: Tensor) -> bool:
        return leaf.ndim > 0 and leaf.shape[0] == self.batch

    def _has_length(self, leaf: Tensor) -> bool:
        if leaf.ndim not in (2, 3) or leaf.shape[0] not in (self.batch, 1):
            return False
        features = leaf.ndim == 3 and leaf.is_floating_point()
        return leaf.shape[1] == self.length and not (features and self.of_table)


def _explicit(forward: Callable[..., Any], kwargs: Mapping[str, Any]) -> inspect.Signature:
    """Return a signature that names each keyword which `**kwargs` would take."""
    signature = inspect.signature(forward)
    known = signature.parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return signature
    kept = [parameter for parameter in known.values() if parameter.kind != parameter.VAR_KEYWORD]
    kind = inspect.Parameter.KEYWORD_ONLY
    taken = {parameter.name for parameter in kept if parameter.kind != parameter.POSITIONAL_ONLY}
    extra = [inspect.Parameter(key, kind) for key in kwargs if key not in taken]
    return signature.replace(parameters=[*kept, *extra])


def parameter_names(model: nn.Module, count: int) -> list[str]:
    """Return the names of the positional parameters of `forward`; `*xs` are `xs.0`, `xs.1`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in found if parameter.kind in kinds]
    rest = [parameter.name for parameter in found if parameter.kind is parameter.VAR_POSITIONAL]
    return names + [f"{name}.{place}" for name in rest for place in range(count - len(names))]


@contextlib.contextmanager
def spelled_out(model: nn.Module, inputs: Inputs) -> Iterator[inspect.Signature]:
    """Let `forward` name the keywords that its `**kwargs` takes: torch.export cannot nest them."""
    forward = model.forward
    named = _explicit(forward, inputs.kwargs)
    if named == inspect.signature(forward):
        yield named
        return

    def spelled(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    own = vars(model).get("forward")
    setattr(spelled, "__signature__", named)  # noqa: B010 - a function's type has no such field
    vars(model)["forward"] = spelled
    try:
        yield named
    finally:
        del vars(model)["forward"]
        vars(model).update({} if own is None else {"forward": own})


def read_inputs(given: object) -> Inputs:
    """Tell positional from keyword arguments and check that there is a tensor among them.

    The batch is the first dimension of the first tensor that has one. The length is the second
    dimension of the first [batch, length] table of integers or, with none, of the first
    [batch, length, channels] tensor. Tensors of other sizes there (one row of positions for all
    texts, more images than texts, a target of another length) keep the sizes that they have.
    Raises UsageError for anything else.
    """
    args, kwargs = _split(given)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        raise UsageError(f"no tensor among the example inputs ({type(given).__name__})", FORMS)
    batch = next((t.shape[0] for t in tensors if t.ndim), None)
    tables = [t for t in tensors if t.ndim == 2 and not t.is_floating_point()]
    values = [t for t in tensors if t.ndim == 3 and t.shape[0] == batch]
    source = next(iter(tables or values), None)
    return Inputs(args, kwargs, batch, None if source is None else source.shape[1], bool(tables))


def _split(given: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, Mapping):
        return (), dict(given)
    if not isinstance(given, (tuple, list)):
        raise UsageError(f"example inputs cannot be a {type(given).__name__}", FORMS)
    match given:
        case [tuple() | list() as args, Mapping() as kwargs]:
            return tuple(args), dict(kwargs)
    return tuple(given), {}
