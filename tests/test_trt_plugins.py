"""Our plugins in the Python package of TensorRT's bindings, above a stand-in for its library."""

from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.backends import trt_plugins
from effopt.plugin import DOMAIN, Plugin, results, running
from tests import tensorrt_stub
from tests.plugin_runs import on_host
from tests.test_plugins import KERNELS

needs_bindings = pytest.mark.skipif(
    tensorrt_stub.package() is None, reason="the bindings of TensorRT are not installed"
)
TYPES = {
    torch.float32: tensorrt_stub.DataType.FLOAT,
    torch.float16: tensorrt_stub.DataType.HALF,
    torch.bfloat16: tensorrt_stub.DataType.BF16,
    torch.int64: tensorrt_stub.DataType.INT64,
    torch.int32: tensorrt_stub.DataType.INT32,
    torch.int8: tensorrt_stub.DataType.INT8,
}


class Built:
    """One plugin as TensorRT makes it for a node of an ONNX file."""

    def __init__(self, trt: Any, plugin: Plugin, inputs: Any, attributes: Any) -> None:
        creator = trt.registry.get_creator(plugin.name, "1", DOMAIN)
        fields = [tensorrt_stub.Field(key, _array(attributes[key])) for key in plugin.attributes]
        prefer = trt.QuickPluginCreationRequest.PREFER_AOT
        self.inputs = inputs
        self.made = creator.create_plugin(plugin.name, DOMAIN, fields, None, prefer)
        self.made.set_tactic(0)
        self.results = results(plugin, inputs, attributes)

    def types(self) -> list[Any]:
        kinds = [TYPES[tensor.dtype] for tensor in self.inputs]
        return list(self.made.get_output_data_types(kinds, [t.ndim for t in self.inputs]))

    def shapes(self) -> list[list[int]]:
        sizes = [[tensorrt_stub.DimensionExpr(n) for n in t.shape] for t in self.inputs]
        found = self.made.get_output_shapes(sizes, [], tensorrt_stub.ExprBuilder())
        return [[size.value for size in shape] for shape in found]

    def launch(self) -> tuple[list[int], list[int], str, bytes]:
        """Return grid, block and shared bytes; the scalars; the entry and its code."""
        shapes = [(t.dtype, list(t.shape)) for t in self.inputs] + self.results
        described = [
            tensorrt_stub.TensorDescription(tuple(sizes), TYPES[kind]) for kind, sizes in shapes
        ]
        launch, scalars = tensorrt_stub.LaunchParameters(), tensorrt_stub.Scalars()
        builder, count = tensorrt_stub.ExprBuilder(), len(self.inputs)
        self.made.get_launch_params([], described, count, launch, scalars, builder)
        entry, code = self.made.get_kernel(described[:count], described[count:])
        numbers = [_number(value) for value in vars(launch).values()]
        return numbers, [_number(scalars[place]) for place in sorted(scalars)], entry, code


def _array(value: Any) -> Any:
    return torch.tensor([value]).numpy()


def _number(expression: Any) -> int:
    return int(expression.expr.value)


@needs_bindings
@pytest.mark.parametrize("name", KERNELS)
def test_an_engine_gets_the_launch_that_was_checked_on_the_host(name: str) -> None:
    kernel = KERNELS[name]
    assert kernel.plugin is not None
    seen = list[str]()
    with tensorrt_stub.tensorrt() as trt:
        trt_plugins.register(trt, [name], lambda stem: f"ptx of {stem}")

        def build(plugin: Plugin, inputs: Any, attributes: Any) -> list[Tensor]:
            built = Built(trt, plugin, inputs, attributes)
            assert built.types() == [TYPES[kind] for kind, _ in built.results]
            assert built.shapes() == [sizes for _, sizes in built.results]
            numbers, scalars, entry, code = built.launch()
            wanted = plugin.launch(plugin.known([t.shape for t in inputs], attributes))
            assert numbers == [*wanted.grid, wanted.block, 1, 1, wanted.shared]
            assert scalars == list(wanted.scalars)
            assert (entry, code) == (plugin.entry("float32"), f"ptx of {plugin.stem}".encode())
            seen.append(entry)
            return on_host(plugin, inputs, attributes)

        with running(build):
            for sample in kernel.samples():
                real = [x.float() if _half(x) else x for x in sample]
                kernel.plugin.adapt(*real)
    assert seen


def _half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.float16


@needs_bindings
@pytest.mark.parametrize(
    ("version", "ok"), [("10.9.0.34", False), ("10.10.0", True), ("11.4.0", True)]
)
def test_versions_that_find_plugins_by_their_domain(version: str, ok: bool) -> None:
    with tensorrt_stub.tensorrt(version) as trt:
        found = trt_plugins.supports(trt)
    assert found.ok == ok
    assert ok or version in found.reason
