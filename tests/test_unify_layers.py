"""unify-layers: every spelling of an activation, what must stay, and the note."""

import math

import pytest
import torch
from torch import Tensor

from tests.layer_forms import C, Model, N, Spelling, becomes, by_mean, check, stays

ROOT = math.sqrt(2 / math.pi)
ERF: tuple[Spelling, ...] = (
    lambda s, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    lambda s, x: 0.5 * (x * (torch.erf(x * 0.7071067811865476) + 1)),
    lambda s, x: (1 + torch.erf(math.sqrt(0.5) * x)) * x / 2,
)
TANH: tuple[Spelling, ...] = (
    lambda s, x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
    lambda s, x: x * 0.5 * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    lambda s, x: x * (0.5 * (torch.tanh((x + x * x * x * 0.044715) * ROOT) + 1)),
)
SILU: tuple[Spelling, ...] = (
    lambda s, x: x * torch.sigmoid(x),
    lambda s, x: torch.sigmoid(x) * x,
    lambda s, x: x / (1 + torch.exp(-x)),
)


@pytest.mark.parametrize("spelling", ERF)
def test_gelu(spelling: Spelling) -> None:
    becomes(spelling, f"gelu[batch, {N}, {C}] = gelu(x)")


@pytest.mark.parametrize("spelling", TANH)
def test_gelu_by_tanh(spelling: Spelling) -> None:
    becomes(spelling, f"gelu[batch, {N}, {C}] = gelu(x, approximate=tanh)")


@pytest.mark.parametrize("spelling", SILU)
def test_silu(spelling: Spelling) -> None:
    becomes(spelling, f"silu[batch, {N}, {C}] = silu(x)")


def unbiased(s: Model, x: Tensor) -> Tensor:
    variance = x.var(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5) * s.w + s.b


def eps_outside(s: Model, x: Tensor) -> Tensor:
    deviation = x.std(-1, unbiased=False, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (deviation + 1e-5)


def channels_first(s: Model, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-5)


def other_mean(s: Model, x: Tensor) -> Tensor:
    centred, y = x - x.mean(-1, keepdim=True), x.tanh()
    variance = (y - y.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5)


def l2_norm(s: Model, x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def rms_of_another(s: Model, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.tanh().pow(2).mean(-1, keepdim=True) + 1e-6)


def wrong_cubic(s: Model, x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044 * x**3)))


def quick_gelu(s: Model, x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def squared_relu(s: Model, x: Tensor) -> Tensor:
    return x.relu() ** 2


def gated(s: Model, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x + 1)


def masked_mean(s: Model, x: Tensor) -> Tensor:
    mask = (x > 0).float()
    return (x * mask).sum(1) / mask.sum(1)


def other_count(s: Model, x: Tensor) -> Tensor:
    return x.sum(1) / C


def two_tokens(s: Model, x: Tensor) -> Tensor:
    return x[:, 0:2].flatten(1)


def kept_token(s: Model, x: Tensor) -> Tensor:
    return x[:, 0:1] + x


@pytest.mark.parametrize(
    "spelling",
    [
        *(unbiased, eps_outside, channels_first, other_mean, l2_norm, rms_of_another),
        *(wrong_cubic, quick_gelu, squared_relu, gated),
        *(masked_mean, other_count, two_tokens, kept_token),
    ],
)
def test_what_is_another_layer_stays(spelling: Spelling) -> None:
    stays(spelling)


def test_the_transpose_of_an_input_is_read() -> None:
    stays(lambda s, x: x.transpose(1, 2))


def test_the_note_counts_what_was_found() -> None:
    def block(s: Model, x: Tensor) -> Tensor:
        return by_mean(s, x).mul(0.5).tanh() + x * torch.sigmoid(x)

    check(block).run("canonicalize,unify-layers").noted("1 layer_norm, 1 silu")
