"""The sizes that an engine is built for: defaults, what is asked for, and what is refused."""

import pytest
import torch
from torch import Tensor, nn

from effopt.backends.trt_profiles import Range, known_sizes, profiles, ranges, read_sizes
from effopt.capture import capture
from effopt.errors import PreconditionError, UnsafeFileError, UsageError
from effopt.signature import Signature, TensorSpec

KNOWN = {"batch": (1, 2, None), "length": (2, 16, 66)}


def spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "int64", shape, f"{name}_port")


def signature(*specs: TensorSpec) -> Signature:
    return Signature(specs, (), {"tuple": []})


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(20, 4)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.places.weight[: ids.shape[1]] * ids[..., None]
        return found


def test_what_a_model_takes_is_read_from_its_capture() -> None:
    program = capture(Text(), torch.ones(3, 7).long(), dynamic=("batch", "length"))
    sizes = known_sizes(program)
    assert sizes["batch"] == (1, 3, None)
    assert sizes["length"][1:] == (7, 20)
    assert read_sizes({name: list(size) for name, size in sizes.items()}) == sizes
    fixed = capture(Text(), torch.ones(3, 7).long(), dynamic=())
    assert known_sizes(fixed) == {}


def test_defaults() -> None:
    assert ranges(KNOWN, {}) == {"batch": (1, 8, 64), "length": (2, 16, 66)}
    assert ranges({"length": (2, 16, None)}, {}) == {"length": (2, 16, 64)}
    assert ranges({"batch": (2, 4, 6)}, {}) == {"batch": (2, 6, 6)}
    assert ranges({}, {}) == {}


def test_every_input_gets_its_three_shapes() -> None:
    ports = signature(spec("ids", "batch", "length"), spec("scale", 3), spec("mask", "batch", 1, 4))
    asked: dict[str, Range] = {"batch": (1, 2, 4), "length": (8, 8, 8)}
    assert profiles(ports, ranges(KNOWN, asked), "model.onnx") == {
        "ids_port": ((1, 8), (2, 8), (4, 8)),
        "mask_port": ((1, 1, 4), (2, 1, 4), (4, 1, 4)),
    }


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"length": (1, 8, 16)}, "length 1 to 16 is outside of what the model takes (from 2 to 66"),
        ({"length": (8, 16, 67)}, "(from 2 to 66)"),
        ({"batch": (8, 4, 64)}, "batch 8,4,64 is no least, best and largest size"),
        ({"width": (1, 2, 3)}, "the width of this engine is fixed (sizes left open: batch, length"),
    ],
)
def test_sizes_that_the_model_does_not_take(asked: dict[str, Range], reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        ranges(KNOWN, asked)
    assert reason in caught.value.reason
    assert caught.value.remedy


def test_a_size_that_follows_from_others_is_refused() -> None:
    ports = signature(spec("kept", "batch", "size2"))
    with pytest.raises(PreconditionError, match="its size size2 follows from others") as caught:
        profiles(ports, {"batch": (1, 8, 64)}, "segment2.onnx")
    assert caught.value.node == "segment2.onnx: kept"


@pytest.mark.parametrize(
    "record",
    [None, [], {"batch": 3}, {"batch": [1, 2]}, {"batch": [1, None, 3]}, {"batch": [1, "2", 3]},
     {"batch": [True, 2, 3]}],
)  # fmt: skip
def test_a_damaged_record_of_sizes(record: object) -> None:
    with pytest.raises(UnsafeFileError, match="sizes"):
        read_sizes(record)
