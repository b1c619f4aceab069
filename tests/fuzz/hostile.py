"""Operators between blocks that look harmless: each must be refused, undone or mended rightly."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Operator = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes x [B, N, C], the first x of the model, and a random [N, N] table."""


def _mask_constant(x: Tensor, early: Tensor, table: Tensor) -> Tensor:
    keep = torch.arange(x.shape[1]) % 3 != 1
    return x * keep[None, :, None]


def _sorted(x: Tensor, early: Tensor, table: Tensor) -> Tensor:
    order = x.norm(dim=-1).argsort(dim=1)
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


def _argmax(x: Tensor, early: Tensor, table: Tensor) -> Tensor:
    place = x[..., 0].argmax(dim=1)
    return x + x[torch.arange(x.shape[0]), place].unsqueeze(1)


def _window(x: Tensor, early: Tensor, table: Tensor) -> Tensor:
    b, n, c = x.shape
    two = F.pad(x, (0, 0, 0, n % 2)).reshape(b, (n + 1) // 2, 2, c)
    return (two + two.mean(2, keepdim=True)).reshape(b, -1, c)[:, :n]


def _excite(x: Tensor, early: Tensor, table: Tensor) -> Tensor:
    return x * torch.sigmoid(x.mean(2, keepdim=True) + x.mean(1, keepdim=True))


def _topk(x: Tensor, early: Tensor, table: Tensor) -> Tensor:
    best = x.norm(dim=-1).topk(2, dim=1).indices
    rows = x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return x + rows.mean(1, keepdim=True)


def _scatter(x: Tensor, early: Tensor, table: Tensor) -> Tensor:
    place = torch.arange(x.shape[1]).flip(0)[None, :, None].expand_as(x)
    return torch.zeros_like(x).scatter(1, place, x) + x


OPERATORS: dict[str, Operator] = {
    "roll": lambda x, e, t: x + x.roll(1, 1),
    "flip": lambda x, e, t: x + x.flip(1),
    "cumsum": lambda x, e, t: x + x.cumsum(1) * 0.1,
    "softmax": lambda x, e, t: x + x.softmax(1),
    "conv": lambda x, e, t: x + F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "add_mean": lambda x, e, t: x + x.mean(1, keepdim=True),
    "add_max": lambda x, e, t: x - x.amax(1, keepdim=True),
    "gate_first": lambda x, e, t: x * torch.sigmoid(x[:, :1]),
    "max": lambda x, e, t: x + x.max(dim=1, keepdim=True).values,
    "argmax": _argmax,
    "strided": lambda x, e, t: x + x[:, ::2].mean(1, keepdim=True),
    "sort": _sorted,
    "concat": lambda x, e, t: torch.cat([x, x], 1)[:, : x.shape[1]],
    "cat_drop": lambda x, e, t: torch.cat([x[:, :1], x[:, 1:] * 2], 1),
    "window": _window,
    "squeeze_excite": _excite,
    "topk": _topk,
    "batch_mean": lambda x, e, t: x + x.mean(0, keepdim=True),
    "batch_flip": lambda x, e, t: x + x.flip(0),
    "scatter": _scatter,
    "shift": lambda x, e, t: x + F.pad(x, (0, 0, 1, 0))[:, :-1],
    "mask_constant": _mask_constant,
    "linear_tokens": lambda x, e, t: x + F.linear(x.transpose(1, 2), t).transpose(1, 2),
    "matmul_tokens": lambda x, e, t: x + t.softmax(-1) @ x,
    "einsum": lambda x, e, t: x + torch.einsum("nm,bmc->bnc", t, x),
    "first_difference": lambda x, e, t: x - x[:, :1],
    "std": lambda x, e, t: x / (1 + x.std(1, keepdim=True)),
    "select_add": lambda x, e, t: x + x[:, 2].unsqueeze(1),
    "norm_tokens": lambda x, e, t: x / (1 + x.norm(dim=1, keepdim=True)),
    "index_tokens": lambda x, e, t: x + x[:, torch.tensor([0, 2])].mean(1, keepdim=True),
    "add_early": lambda x, e, t: x + e,
    "mul_early": lambda x, e, t: x * torch.sigmoid(e.mean(-1, keepdim=True)),
    "table": lambda x, e, t: x + t[:, : x.shape[2]] if t.shape[1] >= x.shape[2] else x + t[:, :1],
    "repeat_mean": lambda x, e, t: x + x.mean(1, keepdim=True).repeat(1, x.shape[1], 1),
    "noncontiguous": lambda x, e, t: x.transpose(0, 1).contiguous().transpose(0, 1) * 1.5,
}
"""What may stand between two blocks, by name."""
