"""Our plugins in TensorRT, as its quickly deployable plugins of the ahead-of-time form.

The engine then holds PTX, launch rule and all: what runs it needs neither this package nor Python.
Written by the documentation and the Python parts of the bindings 10.16 and 11.4; run on no device.
The parser finds a plugin by the domain of its node from 10.10 on.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from effopt.backend import YES, Support
from effopt.backends.onnx_plugins import plugins
from effopt.plugin import DOMAIN, FLOAT_TYPE, FLOATS, Plugin, Port
from effopt.sizes import Algebra, bits, evaluate

LEAST_VERSION = (10, 10)

Source = Callable[[str], str]
"""Returns the PTX of a stem, for the device that an engine is built for."""


def supports(trt: Any) -> Support:
    """Tell whether a TensorRT module takes these plugins."""
    version = tuple(int(word) for word in trt.__version__.split(".")[:2])
    if not hasattr(trt, "QuickPluginCreationRequest"):
        return Support(False, f"{trt.__name__} {trt.__version__} has no ahead-of-time plugins")
    if version < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        return Support(False, f"TensorRT {trt.__version__} finds plugins by domain from {least} on")
    return YES


def stems(names: Iterable[str]) -> set[str]:
    """Return the stems of the sources of plugins."""
    return {plugins()[name].stem for name in names}


def register(trt: Any, names: Iterable[str], source: Source) -> None:
    """Register plugins by the names of their nodes in TensorRT's registry.

    `trt` is the module `tensorrt`, `source` gives the PTX that goes into engines.
    """
    api = importlib.import_module(f"{trt.__name__}.plugin")
    for name in names:
        _register(trt, api, plugins()[name], source)


def _register(trt: Any, api: Any, plugin: Plugin, source: Source) -> None:
    identity = f"{DOMAIN}::{plugin.name}"
    count = len(plugin.inputs)

    def describe(*given: Any, **attributes: Any) -> Any:
        known = _known(api, plugin, given, attributes)
        real = _real(plugin, given)
        made = tuple(_described(trt, api, port, known, real) for port in plugin.outputs)
        return made

    def implement(*given: Any) -> Any:
        inputs, values = given[:count], given[count:-2]
        attributes = dict(zip(plugin.attributes, values, strict=True))
        real = _real(plugin, inputs)
        dtype = next(name for name in FLOATS if getattr(trt, name) == real)
        launch = plugin.launch(_known(api, plugin, inputs, attributes), _algebra(api))
        return plugin.entry(dtype), source(plugin.stem), *_launched(api, launch)

    # Both are read by their signatures, which differ from plugin to plugin.
    descriptions: Any = tuple.__class_getitem__((api.TensorDesc,) * len(plugin.outputs))
    _sign(describe, _parameters(api, plugin), descriptions)
    found = tuple[str, str, api.KernelLaunchParams, api.SymIntExprs]
    last = [("outputs", tuple[api.TensorDesc]), ("tactic", int)]
    _sign(implement, [*_parameters(api, plugin), *last], found)
    api.register(identity)(describe)
    api.aot_impl(identity)(implement)


def _parameters(api: Any, plugin: Plugin) -> list[tuple[str, Any]]:
    return [*((port.name, api.TensorDesc) for port in plugin.inputs), *plugin.attributes.items()]


def _sign(function: Any, parameters: Sequence[tuple[str, Any]], returns: Any) -> None:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    made = [inspect.Parameter(name, kind, annotation=own) for name, own in parameters]
    function.__signature__ = inspect.Signature(made, return_annotation=returns)


def _known(
    api: Any, plugin: Plugin, given: Sequence[Any], attributes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return sizes in TensorRT's algebra; integers are lifted: they may stand left of operators."""
    number = _algebra(api).number
    lifted = {name: number(v) if isinstance(v, int) else v for name, v in attributes.items()}
    return plugin.known([tensor.shape_expr for tensor in given], lifted)


def _real(plugin: Plugin, given: Sequence[Any]) -> Any:
    """Return the type of the inputs of the float type."""
    pairs = zip(plugin.inputs, given, strict=True)
    return next(tensor.dtype for port, tensor in pairs if port.dtype == FLOAT_TYPE)


def _described(trt: Any, api: Any, port: Port, known: Mapping[str, Any], real: Any) -> Any:
    sizes = tuple(evaluate(size, known, _algebra(api)) for size in port.sizes)
    kind = real if port.dtype == FLOAT_TYPE else getattr(trt, port.dtype)
    return api.from_shape_expr(sizes, dtype=kind)


def _algebra(api: Any) -> Algebra:
    """Return TensorRT's algebra of sizes, in which numbers are sizes too."""
    functions = {"cdiv": api.cdiv, "bits": lambda value: api.ShapeExpr(bits(value))}
    return Algebra(api.ShapeExpr, functions)


def _launched(api: Any, launch: Any) -> tuple[Any, Any]:
    made = api.KernelLaunchParams()
    made.grid_x, made.grid_y, made.grid_z = launch.grid
    made.block_x, made.shared_mem = launch.block, launch.shared
    scalars = api.SymIntExprs(len(launch.scalars))
    for place, scalar in enumerate(launch.scalars):
        scalars[place] = api.SymInt32(scalar)
    return made, scalars
