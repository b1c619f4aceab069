"""Multiply-accumulates against the figures that papers print, and operator by operator."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from effopt.capture import capture
from effopt.cost import macs, node_count
from effopt.errors import UsageError


def vit(width: int, depth: int, heads: int) -> nn.Module:
    """Build a ViT/16 at 224 with 1000 classes and no weights: only shapes matter here."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_labels=1000,
    )
    with torch.device("meta"):
        return ViTForImageClassification(config)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "giga"),
    [(192, 12, 3, 1.254), (384, 12, 6, 4.599), (768, 12, 12, 17.564), (1024, 24, 16, 61.555)],
    ids=["DeiT-T", "DeiT-S", "ViT-B", "ViT-L"],
)
def test_golden_macs(width: int, depth: int, heads: int, giga: float) -> None:
    images = torch.empty(2, 3, 224, 224, device="meta")
    program = capture(vit(width, depth, heads), {"pixel_values": images})
    assert round(macs(program) / 1e9, 3) == giga
    assert macs(program, {"batch": 8}) == 8 * macs(program)


class Calls(nn.Module):
    """A module of one function, with some weights to use."""

    def __init__(self, function: Any, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.weights)


CASES = {
    "linear": (functional.linear, [(2, 5, 4)], [(7, 4), (7,)], 2 * 5 * 7 * 4),
    "matmul": (torch.matmul, [(2, 5, 4)], [(4, 3)], 2 * 5 * 4 * 3),
    "bmm": (lambda x: torch.bmm(x, x.transpose(1, 2)), [(2, 5, 4)], [], 2 * 5 * 5 * 4),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), [(2, 4)], [(4, 3), (3,)], 2 * 4 * 3),
    "baddbmm": (
        lambda x, b: torch.baddbmm(b, x, x.transpose(1, 2)),
        [(2, 5, 4)],
        [(5, 5)],
        2 * 5 * 5 * 4,
    ),
    "mv": (lambda x, w: torch.mv(x, w), [(2, 4)], [(4,)], 8),
    "attention": (
        lambda x: functional.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3]),
        [(2, 3, 5, 4)],
        [],
        2 * 3 * 5 * 3 * (4 + 4),
    ),
    "conv1d": (functional.conv1d, [(2, 4, 9)], [(6, 4, 3)], 2 * 6 * 7 * 12),
    "conv2d, grouped": (
        lambda x, w: functional.conv2d(x, w, groups=2),
        [(2, 4, 8, 8)],
        [(6, 2, 3, 3)],
        2 * 6 * 6 * 6 * 18,
    ),
    "conv3d, padded": (
        lambda x, w: functional.conv3d(x, w, padding="same"),
        [(2, 1, 4, 4, 4)],
        [(1, 1, 3, 3, 3)],
        2 * 64 * 27,
    ),
    "transposed convolution": (
        functional.conv_transpose2d,
        [(2, 4, 5, 5)],
        [(4, 3, 2, 2)],
        2 * 4 * 25 * 12,
    ),
    "einsum": (
        lambda x, w: torch.einsum("bnc,cd->bnd", x, w),
        [(2, 5, 4)],
        [(4, 3)],
        2 * 5 * 3 * 4,
    ),
    "einsum with an ellipsis": (
        lambda x, w: torch.einsum("...c,dc->...d", x, w),
        [(2, 5, 4)],
        [(3, 4)],
        2 * 5 * 3 * 4,
    ),
    "norm, softmax, gather": (
        lambda x: functional.layer_norm(x, (4,)).softmax(-1)[:, :2],
        [(2, 5, 4)],
        [],
        0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_family(name: str) -> None:
    function, inputs, weights, wanted = CASES[name]
    program = capture(Calls(function, *weights), tuple(torch.zeros(s) for s in inputs), dynamic=())
    assert macs(program) == wanted


def test_sizes_are_taken_by_name() -> None:
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3))
    ids = torch.zeros(2, 7, dtype=torch.int64)
    program = capture(model, ids, dynamic=("batch", "length"))
    assert macs(program) == 7 * 12
    assert macs(program, {"batch": 2, "length": 5}) == 2 * 5 * 12


def test_an_unknown_size_is_refused() -> None:
    program = capture(nn.Linear(4, 3), torch.zeros(2, 4))
    with pytest.raises(UsageError, match="no dynamic size 'lenght'"):
        macs(program, {"lenght": 4})


def test_nodes_are_operators_only() -> None:
    program = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(2, 4))
    assert node_count(program) == 2
