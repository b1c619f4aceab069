"""What a kernel is: one operator of ours, its meaning, its standard form, its shapes and axes.

Kernels live in `effopt.backends.kernels`, one a file. A pass puts a kernel's operator into the
graph by name; a backend without a plugin for it replaces it by `lowering`.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch._ops import OpOverload

from effopt.errors import unknown

if TYPE_CHECKING:
    from effopt.plugin import Plugin


@dataclass(frozen=True)
class Kernel:
    """One operator of the namespace `effopt`.

    `op` has the meaning in plain torch as its implementation and a shape rule for tracing.
    `lowering` is the same function in operators that every exporter knows, in fixed tie order.
    `axes` is its row in the table of axis rules. `samples` makes arguments to check `lowering`
    against `op`; results may differ by `tolerance` times the largest value. `plugin` is its form
    on a GPU, see `effopt.plugin`; None where standard operators are as good.
    """

    op: OpOverload
    lowering: Callable[..., Any]
    axes: Callable[..., Any]
    samples: Callable[[], list[tuple[Any, ...]]]
    tolerance: float
    plugin: "Plugin | None" = None


def kernel(name: str) -> Kernel:
    """Return a kernel by its operator's name, as in `kernel("merge_tokens").op`."""
    from effopt.backends.kernels import TABLE

    if name not in TABLE:
        raise unknown("kernel", name, TABLE)
    module, _, attribute = TABLE[name].partition(":")
    found: Kernel = getattr(importlib.import_module(module), attribute)
    return found


@functools.cache
def kernels() -> dict[OpOverload, Kernel]:
    """Return every kernel by its operator."""
    from effopt.backends.kernels import TABLE

    return {found.op: found for found in map(kernel, TABLE)}


def lowerings() -> dict[OpOverload, Callable[..., Any]]:
    """Return what stands for each operator where no plugin does."""
    return {op: found.lowering for op, found in kernels().items()}


def adapters() -> dict[OpOverload, Callable[..., Any]]:
    """Return what puts the node of its plugin for each operator, or `lowering` without one."""
    return {op: _adapter(found) for op, found in kernels().items()}


def _adapter(found: Kernel) -> Callable[..., Any]:
    from effopt.plugin import NoLaunch

    plugin = found.plugin
    if plugin is None:
        return found.lowering

    def adapt(*args: Any, **named: Any) -> Any:
        try:
            return plugin.adapt(*args, **named)
        except NoLaunch:  # sizes that are broadcast, which no launch is made for
            return found.lowering(*args, **named)

    return adapt
