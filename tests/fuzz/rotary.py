"""Rotary positions, in the spellings of many code bases: each turns a query or key by the place."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.fuzz.spec import Spec

Angles = tuple[Tensor, Tensor] | None


def angles(spec: Spec, x: Tensor) -> Angles:
    """Return cosines and sines [N, D] for the tokens that are turned; None without rotation."""
    if not spec.position.startswith("rotary"):
        return None
    width = _turned_part(spec)
    count = x.shape[0 if spec.tokens_first else 1]
    count = count - spec.front if spec.position == "rotary_rest" else count
    speed = 1.0 / 10.0 ** (torch.arange(width // 2) / (width // 2))
    if spec.position == "rotary_ids":
        table = torch.arange(32)[:, None].float() * speed[None]
        angle = table[torch.arange(count, device=x.device)]
    else:
        angle = torch.arange(count, device=x.device)[:, None].float() * speed[None]
    if spec.position == "rotary_pairs":
        angle = angle.repeat_interleave(2, dim=-1)
    else:
        angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def _turned_part(spec: Spec) -> int:
    return 2 * (spec.head // 4) if spec.position == "rotary_part" else spec.head


def _halves(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([-right, left], dim=-1)


def _pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, swap: Callable[[Tensor], Tensor]) -> Tensor:
    return x * cos[None, None] + swap(x) * sin[None, None]


def turned(spec: Spec, x: Tensor, by: Angles) -> Tensor:
    """Turn x [B, H, N, D] by the place of each token."""
    if by is None:
        return x
    if spec.position == "rotary_rest":
        rest = _turn(x[:, :, spec.front :], *by, _halves)
        return torch.cat([x[:, :, : spec.front], rest], dim=2)
    if spec.position == "rotary_part":
        width = _turned_part(spec)
        return torch.cat([_turn(x[..., :width], *by, _halves), x[..., width:]], dim=-1)
    return _turn(x, *by, _pairs if spec.position == "rotary_pairs" else _halves)
