"""What becomes of the tokens: picks, pools, dense heads and their mixtures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.blocks import norm
from tests.fuzz.spec import Spec

EOS = 2


@dataclass(frozen=True)
class Seen:
    """What a head reads: the last hidden state, all of them, the input's ids, and its mask."""

    x: Tensor
    hidden: list[Tensor]
    ids: Tensor
    mask: Tensor | None

    @property
    def real(self) -> Tensor:
        """The mask [B, N, 1] as numbers."""
        assert self.mask is not None
        return self.mask.unsqueeze(-1).to(self.x.dtype)

    @property
    def rows(self) -> Tensor:
        """The place of every sample in the batch."""
        return torch.arange(self.x.shape[0])


class Head(nn.Module):
    """The layers that heads share."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, width = spec, spec.width
        self.norm = norm("layer" if spec.norm == "none" else spec.norm, width)
        self.probe = nn.Parameter(torch.randn(1, 1, width))
        self.dense = nn.Conv2d(width, 3, 3, padding=1)
        self.classify = nn.Linear(width, 5)
        self.layers = nn.Parameter(torch.randn(8))

    def forward(self, seen: Seen) -> Any:
        return OUTS[self.spec.out](self, seen)

    def grid(self, x: Tensor) -> Tensor:
        rows, columns = self.spec.grid
        patches = x[:, self.spec.front : self.spec.front + rows * columns]
        return patches.transpose(1, 2).reshape(x.shape[0], -1, rows, columns)


def _masked_mean(self: Head, seen: Seen) -> Any:
    return self.classify((seen.x * seen.real).sum(1) / seen.real.sum(1).clamp(min=1e-9))


def _masked_mean_wide(self: Head, seen: Seen) -> Any:
    assert seen.mask is not None
    real = seen.mask.unsqueeze(-1).expand(seen.x.size()).float()
    return torch.sum(seen.x * real, 1) / torch.clamp(real.sum(1), min=1e-9)


def _masked_max(self: Head, seen: Seen) -> Any:
    return self.classify(seen.x.masked_fill(seen.real == 0, -1e9).amax(1))


def _attention_pool(self: Head, seen: Seen) -> Any:
    probe = self.probe.expand(seen.x.shape[0], -1, -1)
    return F.scaled_dot_product_attention(probe, seen.x, seen.x)[:, 0]


def _softmax_pool(self: Head, seen: Seen) -> Any:
    return (seen.x * (seen.x @ self.probe[0, 0]).softmax(1)[..., None]).sum(1)


def _eos(self: Head, seen: Seen) -> Any:
    return seen.x[seen.rows, (seen.ids == EOS).int().argmax(dim=-1)]


def _eos_gather(self: Head, seen: Seen) -> Any:
    place = (seen.ids == EOS).int().argmax(dim=-1)
    return seen.x.gather(1, place[:, None, None].expand(-1, 1, seen.x.shape[2])).squeeze(1)


def _last_real(self: Head, seen: Seen) -> Any:
    assert seen.mask is not None
    return self.classify(seen.x)[seen.rows, seen.mask.sum(-1) - 1]


def _layers(self: Head, seen: Seen) -> Any:
    weights = self.layers[: len(seen.hidden)].softmax(0)
    return (torch.stack(seen.hidden, 1) * weights.view(-1, 1, 1)).sum(1).mean(1)


def _similar(self: Head, seen: Seen) -> Any:
    return torch.einsum("bc,bnc->bn", seen.x[:, 0], seen.x[:, 1:])


def _spans(self: Head, seen: Seen) -> Any:
    start, stop = self.classify(seen.x)[..., :2].split(1, dim=-1)
    return start.squeeze(-1), stop.squeeze(-1)


Out = Callable[[Head, Seen], Any]
OUTS: dict[str, Out] = {
    "cls": lambda s, seen: s.classify(seen.x[:, 0]),
    "mean": lambda s, seen: s.classify(seen.x.mean(1)),
    "mean_patches": lambda s, seen: s.classify(seen.x[:, s.spec.front :].mean(dim=1)),
    "cls_mean": lambda s, seen: torch.cat([seen.x[:, 0], seen.x[:, 1:].mean(1)], -1),
    "mean_std": lambda s, seen: torch.cat([seen.x.mean(1), seen.x.std(1)], -1),
    "masked_mean": _masked_mean,
    "masked_mean_wide": _masked_mean_wide,
    "masked_max": _masked_max,
    "max": lambda s, seen: s.classify(seen.x.amax(1)),
    "min": lambda s, seen: s.classify(seen.x).amin(1),
    "sum": lambda s, seen: seen.x.sum(1),
    "attention_pool": _attention_pool,
    "softmax_pool": _softmax_pool,
    "tokens": lambda s, seen: s.classify(seen.x),
    "tokens_norm": lambda s, seen: F.normalize(seen.x, dim=-1),
    "patches": lambda s, seen: (seen.x[:, : s.spec.front], seen.x[:, s.spec.front :]),
    "several": lambda s, seen: {
        "tokens": seen.x,
        "pooled": torch.tanh(s.classify(seen.x[:, 0])),
    },
    "hidden": lambda s, seen: (seen.x, *seen.hidden),
    "layers": _layers,
    "grid_conv": lambda s, seen: s.dense(s.grid(seen.x)),
    "grid_up": lambda s, seen: F.interpolate(s.dense(s.grid(seen.x)), scale_factor=2.0),
    "grid_levels": lambda s, seen: tuple(s.dense(s.grid(one)) for one in seen.hidden[1:]),
    "last": lambda s, seen: s.classify(seen.x[:, -1]),
    "logits_last": lambda s, seen: s.classify(seen.x[:, -1:, :]),
    "last_real": _last_real,
    "eos": _eos,
    "eos_gather": _eos_gather,
    "eos_max": lambda s, seen: seen.x[seen.rows, seen.ids.argmax(dim=-1)],
    "skip_mean": lambda s, seen: s.norm(seen.x + seen.hidden[0] + seen.hidden[1]).mean(1),
    "skip_tokens": lambda s, seen: s.classify(
        torch.cat([seen.x, seen.hidden[0]], -1)[..., : s.spec.width]
    ),
    "similar": _similar,
    "spans": _spans,
    "detect": lambda s, seen: s.classify(seen.x[:, -s.spec.back :]),
    "transposed": lambda s, seen: seen.x.transpose(1, 2),
    "gram": lambda s, seen: seen.x @ seen.x.transpose(1, 2),
}
"""Each head by its name."""
