"""How a model's outputs nest, and the name that each leaf gets from its place."""

from collections.abc import Sequence
from typing import Any

from torch.utils._pytree import TreeSpec


def keys_of(spec: TreeSpec) -> list[str] | None:
    """Return the keys of a mapping-like node (dict, dataclass, ModelOutput), or None."""
    context, count = spec.context, spec.num_children
    fields = getattr(context, "_fields", None)
    if fields is not None:
        return [str(key) for key in fields]
    if isinstance(context, (list, tuple)) and len(context) == 2 and isinstance(context[0], list):
        context = context[0]  # a registered dataclass: [names of its fields, names left out]
    if isinstance(context, (list, tuple)) and len(context) == count and count:
        return [str(key) for key in context]
    return None


def input_names(spec: TreeSpec, parameters: Sequence[str]) -> list[str]:
    """Name the leaves of (args, kwargs) by the parameters of `forward`: `x`, `states.0`."""
    args, kwargs = spec.children()
    extra = [f"input.{place}" for place in range(len(parameters), args.num_children)]
    positional = zip([*parameters, *extra], args.children(), strict=False)
    named = zip(keys_of(kwargs) or [], kwargs.children(), strict=True)
    pairs = [*positional, *named]
    return [".".join((name, *path)) for name, child in pairs for path in _paths(child)]


def leaf_names(spec: TreeSpec) -> list[str]:
    """Name every leaf by its path: `logits`, `hidden_states.0`; a bare leaf is `output`."""
    names = [".".join(path) for path in _paths(spec)]
    bare = [name or "output" for name in names]
    return [f"output.{name}" if name[0].isdigit() else name for name in bare]


def _paths(spec: TreeSpec) -> list[tuple[str, ...]]:
    if spec.is_leaf():
        return [()]
    keys = keys_of(spec) or [str(place) for place in range(spec.num_children)]
    pairs = zip(keys, spec.children(), strict=True)
    return [(key, *path) for key, child in pairs for path in _paths(child)]


def to_structure(spec: TreeSpec, slots: Sequence[int | None]) -> Any:
    """Write the nesting for `Signature.structure`; `slots` says which output each leaf is."""
    return _structure(spec, iter(slots))


def _structure(spec: TreeSpec, slots: Any) -> Any:
    if spec.is_leaf():
        return next(slots)
    children = [_structure(child, slots) for child in spec.children()]
    keys = keys_of(spec)
    return {"tuple": children} if keys is None else {"dict": dict(zip(keys, children, strict=True))}
