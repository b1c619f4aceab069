"""The quantized linear's meaning against numpy, its worked examples, axes and refusals."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

from effopt.axes import find_axes, show
from effopt.backends.kernels.quantized_linear import ROUNDED
from effopt.capture import capture
from effopt.errors import UsageError
from effopt.kernel import kernel

Floats = Any
"""An array of float64."""
OP = kernel("quantized_linear").op
ULPS = 16
"""Bound on |operator - numpy| / max in units of float32's epsilon: sums of 64 products in another
order and precision (measured: 2); a code that is off by one shows at 10^4."""


def arguments(**changes: Any) -> dict[str, Any]:
    """A symmetric 8-bit linear [5, 64] without activations, but for the changes."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (5, 64), generator=draw, dtype=torch.int8)
    given: dict[str, Any] = {
        "x": torch.randn(2, 3, 64, generator=draw), "codes": codes,
        "scale": torch.rand(5, 1, generator=draw) + 0.5, "zero": None,
        "bias": torch.randn(5, generator=draw), "bits": 8, "group": 64, "activations": "float",
        "step": 1.0, "origin": 0,
    }  # fmt: skip
    return {**given, **changes}


def meant(given: dict[str, Any]) -> Floats:
    """Compute in double precision, integer activations where there are some."""
    x, codes, scale, zero, bias = (
        None if given[name] is None else given[name].double().numpy()
        for name in ("x", "codes", "scale", "zero", "bias")
    )
    shifted = codes - (0 if zero is None else np.repeat(zero, given["group"], axis=1))
    weight = shifted * np.repeat(scale, given["group"], axis=1)
    return ROUND[given["activations"]](x, given) @ weight.T + (0 if bias is None else bias)


def _per_tensor(x: Floats, given: dict[str, Any]) -> Floats:
    low, high = min(0.0, x.min()), max(0.0, x.max())
    step = (high - low) / 255
    zero = np.clip(np.rint(-low / step), 0, 255)
    return (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step


def _per_row(x: Floats, given: dict[str, Any]) -> Floats:
    most = np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-12)
    return np.rint(127 * x / most) * most / 127


def _fixed(x: Floats, given: dict[str, Any]) -> Floats:
    codes = np.clip(np.rint(x / given["step"]) + given["origin"], 0, 255)
    return (codes - given["origin"]) * given["step"]


ROUND = {"float": lambda x, given: x, "tensor": _per_tensor, "row": _per_row, "static": _fixed}


@pytest.mark.parametrize("activations", ["float", "tensor", "row", "static"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_meaning(activations: str, rank: int) -> None:
    x = torch.randn(*(2, 3, 4)[: rank - 1], 64, generator=torch.Generator().manual_seed(rank))
    fixed = {"step": 0.011, "origin": 100} if activations == "static" else {}
    given = arguments(x=x, activations=activations, **fixed)
    near(OP(**given), meant(given))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_meaning_with_zero_points_in_blocks(bits: int, groups: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    codes, zero = (
        torch.randint(0, 1 << bits, (5, n), generator=draw, dtype=torch.uint8) for n in (64, groups)
    )
    scale = torch.rand(5, groups, generator=draw)
    given = arguments(codes=codes, zero=zero, scale=scale, bits=bits, group=64 // groups, bias=None)
    near(OP(**given), meant(given))


def near(got: Tensor, want: Floats) -> None:
    assert got.dtype == torch.float32
    bound = ULPS * np.finfo(np.float32).eps * np.abs(want).max()
    assert np.abs(got.numpy() - want).max() <= bound


@pytest.mark.parametrize(
    ("values", "step", "zero", "codes"),
    [
        # 127, not 128: 42.5 is rounded to the even 42 before 85 is added.
        ([-1, 0, 0.5, 2], 3 / 255, 85, [0, 85, 127, 255]),
        ([1, 2, 3], 3 / 255, 0, [85, 170, 255]),
        ([0, 0, 0], 1.0, 0, [0, 0, 0]),
    ],
)
def test_dynamic_activations_are_those_of_onnx(
    values: list[float], step: float, zero: int, codes: list[int]
) -> None:
    x = np.array(values, dtype=np.float32)
    engine = [item.tolist() for item in _dynamic_quantize(x)]
    assert engine == [codes, pytest.approx(step), zero]
    rounded = ROUNDED["tensor"](torch.tensor(x), 1.0, 0)
    want = (np.array(codes) - zero) * np.float32(step)
    assert rounded.numpy() == pytest.approx(want.astype(np.float32), rel=1e-6)


def _dynamic_quantize(x: NDArray[np.float32]) -> list[Any]:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    kinds: tuple[tuple[str, int, list[None]], ...] = (
        ("q", TensorProto.UINT8, [None]),
        ("s", TensorProto.FLOAT, []),
        ("z", TensorProto.UINT8, []),
    )
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info(name, kind, sizes) for name, kind, sizes in kinds],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return list(session.run(None, {"x": x}))


def test_the_zero_point_of_activations_leaves_the_product() -> None:
    """Codes [0, 85, 127, 255] around 85 times [1, -2, 3, 4] are 721 steps of 3/255."""
    given = arguments(
        x=torch.tensor([[-1.0, 0, 0.5, 2]]), codes=torch.tensor([[1, -2, 3, 4]], dtype=torch.int8),
        scale=torch.ones(1, 1), bias=None, group=4, activations="tensor",
    )  # fmt: skip
    assert OP(**given).item() == pytest.approx(721 * 3 / 255, rel=1e-6)


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert ROUNDED["static"](x, 1.0, 128).tolist() == [0, 2, 2, 0, -2]


def test_static_activations_saturate() -> None:
    x = torch.tensor([-1e9, -10.5, 0, 1e9])
    assert ROUNDED["static"](x, 0.5, 20).tolist() == [-10.0, -10.0, 0.0, 117.5]


def test_a_row_of_zeros_gives_the_bias() -> None:
    given = arguments(x=torch.zeros(1, 64), activations="row")
    assert torch.equal(OP(**given)[0], given["bias"])


def test_rows_do_not_see_each_other() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    louder = x * torch.tensor([[1], [9], [1], [99]])
    assert torch.equal(ROUNDED["row"](louder, 1.0, 0)[0], ROUNDED["row"](x[:1], 1.0, 0)[0])


def test_half_precision_is_computed_in_float32() -> None:
    given = arguments()
    got = OP(**{**given, "x": given["x"].half()})
    assert got.dtype == torch.float16
    assert torch.equal(got, OP(**{**given, "x": given["x"].half().float()}).half())


def test_axes_are_those_of_a_linear_layer() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
            return OP(x, codes, scale, None, None, 8, 8, "row", 1.0, 0) + 1

    shapes = {"x": torch.randn(2, 5, 8), "codes": torch.ones(6, 8, dtype=torch.int8)}
    program = capture(Two(), {**shapes, "scale": torch.ones(6, 1)}, dynamic=())
    axes = program.get(find_axes)
    assert not axes.unknown
    x, codes, _ = (axes.of(node) for node in program.inputs())
    out = axes.of(program.output().args[0][0])  # type: ignore[index, arg-type]
    assert [show(dim) for dim in out] == [show(dim) for dim in (*x[:-1], codes[0])]
    assert show(x[-1]) == show(codes[1])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"bits": 3}, "bits is 3, not 4 or 8"),
    ({"group": 48}, "groups of 48 do not divide the 64 inputs"),
    ({"group": 0}, "groups of 0 do not divide"),
    ({"scale": torch.ones(5)}, r"scale is \[5\], not \[5, 1\]"),
    ({"group": 32, "scale": torch.ones(5, 2), "activations": "row"}, "'row' needs group == 64"),
    ({"activations": "column"}, "'column' is none of float, tensor, row, static"),
    ({"codes": torch.ones(5, 64, dtype=torch.uint8)}, "int8, or uint8 with a zero"),
    ({"activations": "static", "step": 0.0}, "step 0.0 or origin 0 is out of range"),
    ({"activations": "static", "origin": 256}, "origin 256 is out of range"),
    ({"activations": "tensor", "step": 0.5}, "step and origin have no say in 'tensor'"),
]


@pytest.mark.parametrize(("changes", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_arguments_that_contradict_each_other(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        OP(**arguments(**changes))


def test_contradictions_show_when_tracing() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            given = arguments(x=x, group=32, scale=torch.ones(5, 2), activations="tensor")
            return OP(**given)

    with pytest.raises(Exception, match="'tensor' needs group == 64"):
        capture(Wrong(), {"x": torch.randn(2, 64)})
