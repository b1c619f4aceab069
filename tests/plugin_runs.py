"""Ways to run a plugin without a GPU: its function in two runtimes, its CUDA source on the host."""

import ctypes
import functools
import itertools
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from effopt.backends import nvcc
from effopt.backends.onnx_plugins import VERSION, function
from effopt.plugin import DOMAIN, FLOAT_TYPE, Plugin, results

KINDS = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.int8: onnx.TensorProto.INT8,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.bool: onnx.TensorProto.BOOL,
}


def alone(
    plugin: Plugin, inputs: Sequence[Tensor], attributes: Mapping[str, float], opset: int = 20
) -> onnx.ModelProto:
    """Make a file of one node and its function; the sizes of inputs stay open."""
    node = helper.make_node(
        plugin.name,
        [port.name for port in plugin.inputs],
        [f"{port.name}_made" for port in plugin.outputs],
        domain=DOMAIN,
        **attributes,
    )
    given = [
        helper.make_tensor_value_info(
            p.name, KINDS[t.dtype], [f"{p.name}{n}" for n in range(t.ndim)]
        )
        for p, t in zip(plugin.inputs, inputs, strict=True)
    ]
    made = [
        helper.make_tensor_value_info(f"{p.name}_made", KINDS[kind], [None] * len(sizes))
        for p, (kind, sizes) in zip(
            plugin.outputs, results(plugin, inputs, attributes), strict=True
        )
    ]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(
        helper.make_graph([node], "alone", given, made),
        functions=[function(plugin, opset)],
        opset_imports=imports,
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def in_onnxruntime(
    plugin: Plugin, inputs: Sequence[Tensor], attributes: Mapping[str, float]
) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        alone(plugin, inputs, attributes).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    return [torch.from_numpy(np.asarray(y)) for y in session.run(None, _feeds(plugin, inputs))]


def in_reference(
    plugin: Plugin, inputs: Sequence[Tensor], attributes: Mapping[str, float]
) -> list[Tensor]:
    made = ReferenceEvaluator(alone(plugin, inputs, attributes))
    return [torch.from_numpy(np.asarray(y)) for y in made.run(None, _feeds(plugin, inputs))]


def _feeds(plugin: Plugin, inputs: Sequence[Tensor]) -> dict[str, Any]:
    return {p.name: t.contiguous().numpy() for p, t in zip(plugin.inputs, inputs, strict=True)}


# --- the CUDA source on the host ----------------------------------------------------------------


@functools.cache
def host_library(source: Path, backwards: bool) -> ctypes.CDLL:
    """Compile a kernel's source for the host; a loop over threads runs whole in each block.

    `backwards` counts threads down.
    """
    folder = Path(tempfile.mkdtemp(prefix="effopt-host-"))
    words = ["g++", "-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
    words += ["-Wall", "-Werror", f"-I{nvcc.SOURCES}", "-o", str(folder / "host.so"), str(source)]
    words += ["-DEFFOPT_REVERSED"] * backwards
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "host.so"))


def on_host(
    plugin: Plugin,
    inputs: Sequence[Tensor],
    attributes: Mapping[str, float],
    source: Path | None = None,
    backwards: bool = False,
) -> list[Tensor]:
    """Run every block of a launch, one after the other, with arguments in the order of PTX.

    `backwards` begins with the last block, and in each with the last thread: what is right in
    both orders takes nothing from another thread of its phase, and nothing from another block.
    """
    library = host_library(source or nvcc.SOURCES / f"{plugin.stem}.cu", backwards)
    kinds = results(plugin, inputs, attributes)
    held = [tensor.contiguous() for tensor in inputs]
    made = [poisoned(kind, sizes) for kind, sizes in kinds]
    launch = plugin.launch(plugin.known([t.shape for t in held], attributes))
    assert launch.shared <= 48 << 10, "more than a block has without asking for it"
    run: Callable[..., Any] = getattr(library, plugin.entry(float_type(plugin, held)))
    arguments = [
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in held),
        *(ctypes.c_int(scalar) for scalar in launch.scalars),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in made),
    ]
    blocks = list(itertools.product(*(range(count) for count in reversed(launch.grid))))
    for z, y, x in reversed(blocks) if backwards else blocks:
        library.effopt_set_block(x, y, z)
        run(*arguments)
    return made


def float_type(plugin: Plugin, inputs: Sequence[Tensor]) -> str:
    """Return the float type of a call by its name."""
    pairs = zip(plugin.inputs, inputs, strict=True)
    return next(str(t.dtype).removeprefix("torch.") for p, t in pairs if p.dtype == FLOAT_TYPE)


def poisoned(kind: torch.dtype, sizes: Sequence[int]) -> Tensor:
    """Make a tensor of values that no kernel writes, so that a place left out shows."""
    worst = float("nan") if kind.is_floating_point else torch.iinfo(kind).min
    return torch.full(list(sizes), worst, dtype=kind)
