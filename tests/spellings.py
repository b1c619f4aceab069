"""Encoders spelled as timm and others spell them, in the tests' own words, and how to read them.

Each has `blocks()` for the eager oracle. Weights are random, gains are not 1 nor offsets 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

from tests.eager import Block, Step, Tokens, encode

WIDTH, HEADS = 16, 2
Read = Callable[["Net", Tensor], Tensor]
"""What becomes of the last hidden states (or of the first x, before the blocks)."""


class FusedAttention(nn.Module):
    """One projection for query, key and value; a bias [H, N, N] or a mask may be added."""

    def __init__(self, heads: int = HEADS, bias: Tensor | None = None) -> None:
        super().__init__()
        self.heads, self.bias = heads, bias
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(
            attend(q, k, v, self.bias if mask is None else mask).transpose(1, 2).reshape(b, n, c)
        )

    def part(self, place: int) -> Callable[[Tensor], Tensor]:
        return lambda x: self.qkv(x).chunk(3, dim=-1)[place]


class ScaledBlock(nn.Module):
    """Pre-norm block with LayerScale, as in timm."""

    def __init__(self, heads: int = HEADS, bias: Tensor | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = FusedAttention(heads, bias)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.gain1, self.gain2 = (nn.Parameter(torch.ones(WIDTH)) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.gain1 * self.attn(self.norm1(x), mask)
        return x + self.gain2 * self.mlp(self.norm2(x))

    def block(self) -> Block:
        bias = self.attn.bias
        return Block(
            before=self.norm1,
            query=self.attn.part(0),
            key=self.attn.part(1),
            value=self.attn.part(2),
            join=lambda x, attended: x + self.gain1 * self.attn.proj(attended),
            mlp=lambda x: x + self.gain2 * self.mlp(self.norm2(x)),
            heads=self.attn.heads,
            bias=None if bias is None or bias.dtype == torch.bool else bias,
        )


class ParallelBlock(ScaledBlock):
    """Attention and MLP side by side on one norm: the tokens are reduced after both."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        return x + self.attn(h, mask) + self.mlp(h)

    def block(self) -> Block:
        return Block(
            before=self.norm1,
            query=self.attn.part(0),
            key=self.attn.part(1),
            value=self.attn.part(2),
            join=lambda x, attended: x + self.attn.proj(attended) + self.mlp(self.norm1(x)),
            mlp=lambda x: x,
            heads=self.attn.heads,
        )


class ConformerBlock(ScaledBlock):
    """The convolution module of a Conformer for an MLP: a gate, then each channel over time."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GLU())
        self.deep = nn.Conv1d(WIDTH, WIDTH, kernel, padding=kernel // 2, groups=WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.convolved(x + self.gain1 * self.attn(self.norm1(x), mask))

    def convolved(self, x: Tensor) -> Tensor:
        return x + self.gain2 * turned(self.deep(turned(self.mlp(self.norm2(x)))))

    def block(self) -> Block:
        return replace(super().block(), mlp=self.convolved)


class PlacedBlock(ScaledBlock):
    """Adds a table of places [1, N, C] to x ahead of every block."""

    def __init__(self, tokens: int = 12) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(1, tokens, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + self.table, mask)


class Net(nn.Module):
    """What comes first, three blocks, and what is read from the last hidden states."""

    def __init__(
        self, read: Read, first: Read | None = None, blocks: Sequence[ScaledBlock] = ()
    ) -> None:
        super().__init__()
        self.read, self.first = read, first
        self.blocks = nn.ModuleList(blocks or [ScaledBlock() for _ in range(3)])
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls = nn.Parameter(torch.ones(1, 1, WIDTH))
        self.registers = nn.Parameter(torch.ones(1, 2, WIDTH))
        self.head = nn.Linear(WIDTH, 5)
        with torch.no_grad():
            for path, weight in self.named_parameters():
                gain = 1.0 if "norm" in path and path.endswith("weight") else 0.0
                weight.normal_(gain, 0.3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first is None else self.first(self, x)
        for block in self.blocks:
            x = block(x)
        return self.read(self, x)

    def oracle(
        self, x: Tensor, steps: dict[int, Step], read: Callable[["Net", Tokens], Tensor]
    ) -> tuple[Tensor, ...]:
        """Run the eager oracle, in the precision of the net."""
        with torch.no_grad():
            x = x if self.first is None else self.first(self, x)
            blocks = [block.block() for block in self.blocks]
            return (read(self, encode(x, None, blocks, steps)),)


def grid(net: Net, x: Tensor) -> Tensor:
    """Patches of an image, the grid h x w flattened, without a class token."""
    return net.patch(x).flatten(2).transpose(1, 2)


def with_registers(net: Net, x: Tensor) -> Tensor:
    """A class token, two registers, then the patches."""
    b = x.shape[0]
    front = (net.cls.expand(b, -1, -1), net.registers.expand(b, -1, -1))
    return torch.cat([*front, grid(net, x)], 1)


def with_detection(net: Net, x: Tensor) -> Tensor:
    """A class token, the patches, then two detection tokens."""
    b = x.shape[0]
    return torch.cat([net.cls.expand(b, -1, -1), grid(net, x), net.registers.expand(b, -1, -1)], 1)


def mean(net: Net, x: Tensor) -> Tensor:
    return net.head(x.mean(1))


def first_token(net: Net, x: Tensor) -> Tensor:
    return net.head(x[:, 0])


def every_token(net: Net, x: Tensor) -> Tensor:
    return net.head(x)


def turned(x: Tensor) -> Tensor:
    """Channels first, as convolutions want them."""
    return x.transpose(1, 2)


WHOLE: dict[str, Read] = {
    "convolution": lambda _, x: nn.functional.conv1d(turned(x), torch.ones(1, WIDTH, 3)),
    "grid": lambda _, x: nn.functional.conv2d(
        turned(x).unflatten(2, (4, 3)), torch.ones(1, WIDTH, 2, 2)
    ),
    "largest-place": lambda _, x: x.argmax(1).float(),
    "softmax": lambda _, x: x.softmax(1),
    "order": lambda _, x: x.cumsum(1),
    "shift": lambda _, x: x.roll(1, 1),
    "every-other": lambda _, x: x[:, ::2],
    "mixing": lambda _, x: nn.functional.linear(turned(x), torch.ones(5, 12)),
    "product": lambda _, x: x @ turned(x) @ x,
    "norm": lambda _, x: nn.functional.layer_norm(turned(x), [12]),
    "joined": lambda _, x: torch.cat([x, x[:, :1]], 1),
    "no-rule": lambda _, x: x.logcumsumexp(1),
}
"""Reads of twelve tokens that need each of them in its place."""
