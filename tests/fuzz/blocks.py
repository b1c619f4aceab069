"""Attention, MLP and norms, in the spellings of many code bases."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.rotary import Angles, turned
from tests.fuzz.spec import Spec
from tests.fuzz.stages import windowed


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
    """Self-attention, or with `memory` cross-attention, of one spelling."""

    def __init__(self, spec: Spec, crossed: bool) -> None:
        super().__init__()
        self.spec, width = spec, spec.width
        self.groups = 1 if spec.qkv == "grouped" else spec.heads
        self.causal = spec.mask == "causal" and not crossed
        if spec.qkv in ("separate", "grouped"):
            self.q = nn.Linear(width, width)
            self.k, self.v = (nn.Linear(width, self.groups * spec.head) for _ in range(2))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.relative = spec.mask.startswith("relative")
        if self.relative:
            count = spec.count
            self.table = nn.Parameter(torch.randn(2 * count, spec.heads))
            place = torch.arange(count)
            self.register_buffer("index", place[:, None] - place[None] + count)

    def forward(
        self, x: Tensor, mask: Tensor | None, rotary: Angles, memory: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.split(x, x if memory is None else memory)
        q, k = turned(self.spec, q, rotary), turned(self.spec, k, rotary)
        if self.relative:
            table = self.table[self.index].permute(2, 0, 1).unsqueeze(0)  # type: ignore[index]
            mask = table if mask is None else table + mask
        y = CALLS[self.spec.call](self, q, k, v, mask)
        if self.spec.tokens_first:
            return self.out(y.permute(2, 0, 1, 3).reshape(x.shape))
        return self.out(y.transpose(1, 2).reshape(x.shape))

    def split(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value [B, H, N, D]."""
        h, d = self.spec.heads, self.spec.head
        if self.spec.qkv == "unbind":
            wide = self.qkv(x).reshape(*x.shape[:2], 3, h, d)
            order = (2, 1, 3, 0, 4) if self.spec.tokens_first else (2, 0, 3, 1, 4)
            q, k, v = wide.permute(order).unbind(0)
            return q, k, v
        if self.spec.qkv == "chunk":
            parts = self.qkv(x).chunk(3, dim=-1)
        elif self.spec.qkv == "split":
            parts = self.qkv(x).split(x.shape[2], dim=2)
        else:
            parts = (self.q(x), self.k(memory), self.v(memory))
        q, k, v = (self.headed(part) for part in parts)
        if self.groups != h and self.spec.call != "sdpa":
            k, v = (part.repeat_interleave(h // self.groups, dim=1) for part in (k, v))
        return q, k, v

    def headed(self, x: Tensor) -> Tensor:
        d = self.spec.head
        if not self.spec.tokens_first:
            return x.view(*x.shape[:2], -1, d).transpose(1, 2)
        n, b, c = x.shape
        return x.contiguous().view(n, b * (c // d), d).transpose(0, 1).view(b, c // d, n, d)


def _sdpa(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    grouped = {"enable_gqa": True} if self.groups != self.spec.heads else {}
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, **grouped)


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


def _einsum(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    scores = hide(torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1]), mask)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def _bmm(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    b, h, n, d = q.shape
    q, k, v = (part.reshape(b * h, -1, d) for part in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(d)
    if mask is not None:
        scores = hide(scores.view(b, h, n, -1), mask).view(b * h, n, -1)
    return torch.bmm(scores.softmax(-1), v).view(b, h, n, d)


CALLS = {
    "sdpa": _sdpa,
    "eager": _eager,
    "eager_before": _eager_before,
    "eager_query": _eager_query,
    "einsum": _einsum,
    "bmm": _bmm,
}


class Torch(nn.Module):
    """nn.MultiheadAttention; its weights are made and left, or not made."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        first = not spec.tokens_first
        self.inner = nn.MultiheadAttention(spec.width, spec.heads, batch_first=first)
        self.weights = spec.call == "mha_weights"

    def forward(
        self, x: Tensor, mask: Tensor | None, rotary: Angles, memory: Tensor | None = None
    ) -> Tensor:
        other = x if memory is None else memory
        padding = mask if mask is not None and mask.dtype == torch.bool else None
        added = mask if mask is not None and mask.dtype != torch.bool else None
        found: Tensor = self.inner(
            x,
            other,
            other,
            key_padding_mask=padding,
            attn_mask=added,
            need_weights=self.weights,
        )[0]
        return found


class Local(nn.Module):
    """The convolution module of a Conformer, and the MLP behind it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Conv1d(width, 2 * inner, 1)
        self.deep = nn.Conv1d(inner, inner, 3, padding=1, groups=inner)
        self.norm = nn.BatchNorm1d(inner)
        self.down = nn.Conv1d(inner, width, 1)
        self.mlp = Mlp("gelu", width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.up(x.transpose(1, 2)), dim=1)
        y = self.down(F.silu(self.norm(self.deep(y)))).transpose(1, 2)
        return self.mlp(x + y)


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
    """Attention (in windows), for a decoder cross-attention, and MLP on the residual stream."""

    def __init__(self, spec: Spec, windows: bool = False, crossed: bool = False) -> None:
        super().__init__()
        self.spec, self.windows, width = spec, windows, spec.width
        self.attention = self.made(crossed=False)
        self.cross = self.made(crossed=True) if crossed else None
        local = spec.mlp == "conformer"
        mlp = Local(width, 12) if local else Mlp(spec.mlp, width)
        self.mlp = mlp if spec.mlp != "none" else None
        self.norms = nn.ModuleList(norm(spec.norm, width) for _ in range(5))
        gains = [nn.Parameter(torch.ones(width)) for _ in range(2)]
        self.gains = nn.ParameterList(gains) if spec.gain else None

    def made(self, crossed: bool) -> nn.Module:
        torch_own = self.spec.call.startswith("mha")
        return Torch(self.spec) if torch_own else Attention(self.spec, crossed)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        rotary: Angles,
        memory: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        order = self.spec.order
        if order == "parallel":
            seen = self.norms[0](x)
            attended = self.scaled(self.attend(seen, mask, rotary), 0)
            return x + attended + (self.scaled(self.mlp(seen), 1) if self.mlp else 0)
        if order == "post":
            x = self.norms[0](x + self.scaled(self.attend(x, mask, rotary), 0))
            if self.cross is not None:
                x = self.norms[4](x + self.cross(x, hidden, None, memory))
            return self.norms[1](x + self.scaled(self.mapped(x), 1)) if self.mlp else x
        y = self.attend(self.norms[0](x), mask, rotary)
        x = x + self.scaled(self.norms[2](y) if order == "sandwich" else y, 0)
        if self.cross is not None:
            x = x + self.cross(self.norms[4](x), hidden, None, memory)
        if self.mlp is None:
            return x
        y = self.mapped(self.norms[1](x))
        return x + self.scaled(self.norms[3](y) if order == "sandwich" else y, 1)

    def attend(self, x: Tensor, mask: Tensor | None, rotary: Angles) -> Tensor:
        if not self.windows:
            return self.attention(x, mask, rotary)
        return windowed(x, self.spec.grid, lambda window: self.attention(window, None, None))

    def mapped(self, x: Tensor) -> Tensor:
        if self.spec.tokens_first and self.spec.mlp.startswith("con"):
            return self.mlp(x.transpose(0, 1)).transpose(0, 1)
        return self.mlp(x)

    def scaled(self, y: Tensor, place: int) -> Tensor:
        return y if self.gains is None else y * self.gains[place]
