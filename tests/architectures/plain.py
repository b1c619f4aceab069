"""Vision transformers in plain torch, in the spellings that image libraries use."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.architectures.base import Given, architecture

_WIDTH, _HEADS, _SIDE = 32, 2, 4
_TOKENS = _SIDE * _SIDE
_HEAD_WIDTH = _WIDTH // _HEADS
Mixer = Callable[[], nn.Module]


def _images() -> Given:
    return {"x": torch.randn(2, 3, 32, 32)}


class FusedAttention(nn.Module):
    """One projection for query, key and value, cut by reshape, permute and unbind."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.proj = nn.Linear(_WIDTH, _WIDTH)

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        rows, tokens, _ = x.shape
        cut = self.qkv(x).reshape(rows, tokens, 3, _HEADS, _HEAD_WIDTH)
        return cut.permute(2, 0, 3, 1, 4).unbind(0)

    def joined(self, x: Tensor) -> Tensor:
        rows, _, tokens, _ = x.shape
        return self.proj(x.transpose(1, 2).reshape(rows, tokens, _WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.cut(x)
        return self.joined(functional.scaled_dot_product_attention(query, key, value))


class MatmulAttention(FusedAttention):
    """Attention as a product, a softmax and a product."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.cut(x)
        scores = (query * _HEAD_WIDTH**-0.5) @ key.transpose(-2, -1)
        return self.joined(scores.softmax(dim=-1) @ value)


class BiasedAttention(FusedAttention):
    """A table of learned biases, read by the offset of two patches; the class token has three."""

    def __init__(self) -> None:
        super().__init__()
        offsets = (2 * _SIDE - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, _HEADS))
        self.register_buffer("relative_position_index", _offset_index(offsets), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.cut(x)
        size = 1 + _TOKENS
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(size, size, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.joined(attended)


def _offset_index(offsets: int) -> Tensor:
    """Number the offsets between patches; the last three are to, from and within the class."""
    grid = torch.stack(torch.meshgrid(torch.arange(_SIDE), torch.arange(_SIDE), indexing="ij"))
    flat = grid.flatten(1)
    apart = (flat[:, :, None] - flat[:, None, :]) + (_SIDE - 1)
    index = torch.zeros(1 + _TOKENS, 1 + _TOKENS, dtype=torch.long)
    index[1:, 1:] = apart[0] * (2 * _SIDE - 1) + apart[1]
    index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


class ModuleAttention(nn.Module):
    """torch's own attention module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(_WIDTH, _HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class RotaryAttention(FusedAttention):
    """Patches are turned by their row and column; the class token is not."""

    def __init__(self) -> None:
        super().__init__()
        steps = torch.arange(_SIDE, dtype=torch.float32)
        speeds = 1.0 / 100 ** (torch.arange(_HEAD_WIDTH // 4) / (_HEAD_WIDTH // 4))
        angles = steps[:, None] * speeds
        rows = angles[:, None, :].expand(-1, _SIDE, -1)
        columns = angles[None, :, :].expand(_SIDE, -1, -1)
        both = torch.cat([rows, columns], -1).reshape(_TOKENS, -1).repeat_interleave(2, -1)
        self.register_buffer("sin", both.sin(), persistent=False)
        self.register_buffer("cos", both.cos(), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        first, patches = x[:, :, :1], x[:, :, 1:]
        crossed = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).reshape(patches.shape)
        return torch.cat([first, patches * self.cos + crossed * self.sin], dim=2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.cut(x)
        query, key = self.turned(query).type_as(value), self.turned(key).type_as(value)
        return self.joined(functional.scaled_dot_product_attention(query, key, value))


class Mlp(nn.Module):
    """The usual two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(_WIDTH, 2 * _WIDTH)
        self.fc2 = nn.Linear(2 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """A gated layer with a norm before the last projection."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(_WIDTH, 64), nn.Linear(_WIDTH, 64)
        self.norm, self.down = nn.LayerNorm(64), nn.Linear(64, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(functional.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    """Attention and MLP behind their norms, each added to the stream."""

    def __init__(self, attention: Mixer, mlp: Mixer) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.attention, self.mlp = attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ScaledBlock(Block):
    """LayerScale: a gain on each channel before adding."""

    def __init__(self, attention: Mixer, mlp: Mixer) -> None:
        super().__init__(attention, mlp)
        self.gamma1 = nn.Parameter(torch.ones(_WIDTH))
        self.gamma2 = nn.Parameter(torch.ones(_WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attention(self.norm1(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))


class ParallelBlock(Block):
    """Attention and MLP read the same norm and are added at once."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        return x + self.attention(normed) + self.mlp(normed)


class PlainVit(nn.Module):
    """Patches, `prefix` learned tokens before them, blocks, and a head on what `pool` takes."""

    def __init__(
        self,
        attention: Mixer = FusedAttention,
        mlp: Mixer = Mlp,
        block: Callable[[Mixer, Mixer], nn.Module] = Block,
        prefix: int = 1,
        pool: str = "class",
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, _WIDTH, 8, 8)
        self.prefix = nn.Parameter(torch.zeros(1, prefix, _WIDTH)) if prefix else None
        self.position = nn.Parameter(torch.zeros(1, prefix + _TOKENS, _WIDTH))
        self.blocks = nn.Sequential(*(block(attention, mlp) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 5)
        self.head_dist = nn.Linear(_WIDTH, 5) if pool == "distilled" else None
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.position))
        if self.pool == "mean":
            return self.head(x.mean(dim=1))
        if self.head_dist is not None:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return self.head(x[:, 0])


_ROWS: tuple[tuple[str, Callable[[], nn.Module]], ...] = (
    ("plain-fused", PlainVit),
    ("plain-layerscale", lambda: PlainVit(block=ScaledBlock)),
    ("plain-registers", lambda: PlainVit(prefix=5)),
    ("plain-distilled", lambda: PlainVit(prefix=2, pool="distilled")),
    ("plain-relative-bias", lambda: PlainVit(BiasedAttention)),
    ("plain-mean", lambda: PlainVit(prefix=0, pool="mean")),
    ("plain-matmul", lambda: PlainVit(MatmulAttention)),
    ("plain-module", lambda: PlainVit(ModuleAttention)),
    ("plain-eva", lambda: PlainVit(RotaryAttention, SwiGlu)),
    ("plain-parallel", lambda: PlainVit(block=ParallelBlock)),
)

ARCHITECTURES = tuple(architecture(name, "plain", build, _images) for name, build in _ROWS)
