"""Attention, MLP and norms, in the spellings of many code bases."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.spec import Spec

Rotary = tuple[Tensor, Tensor] | None


class HandRms(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def norm(kind: str, width: int) -> nn.Module:
    made: dict[str, Any] = {
        "layer": lambda: nn.LayerNorm(width),
        "rms": lambda: nn.RMSNorm(width, eps=1e-6),
        "rms_hand": lambda: HandRms(width),
        "none": nn.Identity,
    }
    return made[kind]()


class Attention(nn.Module):
    """Self-attention of one spelling."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, width = spec, spec.width
        self.groups = 1 if spec.qkv == "grouped" else spec.heads
        if spec.qkv in ("separate", "grouped"):
            self.q = nn.Linear(width, width)
            self.k, self.v = (nn.Linear(width, self.groups * spec.head) for _ in range(2))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        if spec.mask == "relative":
            count = spec.count
            self.table = nn.Parameter(torch.randn(2 * count, spec.heads))
            place = torch.arange(count)
            self.register_buffer("index", place[:, None] - place[None] + count)

    def forward(self, x: Tensor, mask: Tensor | None, rotary: Rotary) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.split(x)
        if rotary is not None:
            q, k = turn(q, rotary), turn(k, rotary)
        if self.spec.mask == "relative":
            mask = self.table[self.index].permute(2, 0, 1).unsqueeze(0)  # type: ignore[index]
        y = CALLS[self.spec.call](self, q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(b, n, c))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, c = x.shape
        h, d = self.spec.heads, self.spec.head
        if self.spec.qkv == "unbind":
            q, k, v = self.qkv(x).reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        if self.spec.qkv == "chunk":
            parts = self.qkv(x).chunk(3, dim=-1)
        elif self.spec.qkv == "split":
            parts = self.qkv(x).split(c, dim=2)
        else:
            parts = (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.view(b, n, -1, d).transpose(1, 2) for part in parts)
        if self.groups != h and self.spec.call != "sdpa":
            k, v = (part.repeat_interleave(h // self.groups, dim=1) for part in (k, v))
        return q, k, v


def _sdpa(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    grouped = {"enable_gqa": True} if self.groups != self.spec.heads else {}
    causal = self.spec.mask == "causal"
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, **grouped)


def hide(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask


def _eager(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = hide(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, mask)
    return scores.softmax(dim=-1) @ v


def _eager_before(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scale = math.sqrt(math.sqrt(q.shape[-1]))
    scores = hide(torch.matmul(q / scale, (k / scale).transpose(2, 3)), mask)
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def _eager_query(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = hide(torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k), mask)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def _bmm(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    b, h, n, d = q.shape
    flat = [part.reshape(b * h, n, d) for part in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2)) / math.sqrt(d)
    scores = hide(scores.view(b, h, n, n), mask).view(b * h, n, n)
    return torch.bmm(scores.softmax(-1), flat[2]).view(b, h, n, d)


CALLS = {
    "sdpa": _sdpa,
    "eager": _eager,
    "eager_before": _eager_before,
    "eager_query": _eager_query,
    "bmm": _bmm,
}


def turn(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the halves of each head by the place."""
    left, right = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat([-right, left], dim=-1) * rotary[1]


class Torch(nn.Module):
    """nn.MultiheadAttention."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(spec.width, spec.heads, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None, rotary: Rotary) -> Tensor:
        found: Tensor = self.inner(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return found


class Mlp(nn.Module):
    """What maps each token, in one spelling; `conv3` looks at its neighbours as well."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        inner = 12
        if kind.startswith("conv"):
            size = int(kind[-1])
            self.up = nn.Conv1d(width, inner, size, padding=size // 2)
            self.down: nn.Module = nn.Conv1d(inner, width, 1)
            return
        self.up = nn.Linear(width, inner if kind != "gated" else 2 * inner)
        self.gate = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind.startswith("conv"):
            y: Tensor = self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)
            return y
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.kind == "gated":
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.down(torch.sigmoid(gate) * up)
        return self.down(F.relu(self.up(x)) if self.kind == "relu" else F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention and MLP on the residual stream."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, width = spec, spec.width
        self.attention = Torch(spec) if spec.call == "mha" else Attention(spec)
        self.mlp = Mlp(spec.mlp, width) if spec.mlp != "none" else None
        self.norms = nn.ModuleList(norm(spec.norm, width) for _ in range(4))
        gains = [nn.Parameter(torch.ones(width)) for _ in range(2)]
        self.gains = nn.ParameterList(gains) if spec.gain else None

    def forward(self, x: Tensor, mask: Tensor | None, rotary: Rotary) -> Tensor:
        order = self.spec.order
        if order == "parallel":
            seen = self.norms[0](x)
            attended = self.scaled(self.attention(seen, mask, rotary), 0)
            return x + attended + (self.scaled(self.mlp(seen), 1) if self.mlp else 0)
        if order == "post":
            x = self.norms[0](x + self.scaled(self.attention(x, mask, rotary), 0))
            return self.norms[1](x + self.scaled(self.mlp(x), 1)) if self.mlp else x
        y = self.attention(self.norms[0](x), mask, rotary)
        x = x + self.scaled(self.norms[2](y) if order == "sandwich" else y, 0)
        if self.mlp is None:
            return x
        y = self.mlp(self.norms[1](x))
        return x + self.scaled(self.norms[3](y) if order == "sandwich" else y, 1)

    def scaled(self, y: Tensor, place: int) -> Tensor:
        return y if self.gains is None else y * self.gains[place]
