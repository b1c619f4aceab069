"""Small networks whose scale groups follow from their maths, and their programs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from effopt.capture import capture
from effopt.program import Program
from effopt.scales import ScaleGroup, find_scales
from tests.architectures.base import scramble
from tests.check import NORMAL
from tests.programs import apply

WIDTH, HEADS, INNER, WORDS = 32, 4, 64, 50


class Attention(nn.Module):
    """Attention in one spelling: fused or apart, called or written out, with grouped heads."""

    def __init__(self, fused: bool = False, plain: bool = False, groups: int = HEADS) -> None:
        super().__init__()
        self.fused, self.plain, self.groups = fused, plain, groups
        inner = WIDTH // HEADS * groups
        sizes = (WIDTH + 2 * inner,) if fused else (WIDTH, inner, inner)
        self.inputs = nn.ModuleList(nn.Linear(WIDTH, size) for size in sizes)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        found = torch.cat([layer(x) for layer in self.inputs], dim=-1) if self.fused else None
        parts = found.chunk(3, dim=-1) if found is not None else [f(x) for f in self.inputs]
        q, k, v = (p.view(b, n, -1, WIDTH // HEADS).transpose(1, 2) for p in parts)
        k, v = (self.repeat(t) for t in (k, v))
        if self.plain:
            y = (q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v)
        return self.output(y.transpose(1, 2).reshape(b, n, WIDTH))

    def repeat(self, x: Tensor) -> Tensor:
        if self.groups == HEADS:
            return x
        b, heads, n, width = x.shape
        wide = x[:, :, None].expand(b, heads, HEADS // heads, n, width)
        return wide.reshape(b, HEADS, n, width)


class Feedforward(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


Part = Callable[[], nn.Module]


class Network(nn.Module):
    """Words, two blocks, a norm and a head; norms stand before each part or behind its sum."""

    def __init__(self, attention: Part, inner: Part, norm: Part, first: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.parts = nn.ModuleList(made() for _ in range(2) for made in (attention, inner))
        self.norms = nn.ModuleList(norm() for _ in range(4))
        self.first, self.norm, self.head = first, norm(), nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for part, norm in zip(self.parts, self.norms, strict=True):
            x = x + part(norm(x)) if self.first else norm(x + part(x))
        return self.head(self.norm(x))


def layer_norm() -> nn.Module:
    return nn.LayerNorm(WIDTH)


def rms_norm() -> nn.Module:
    return nn.RMSNorm(WIDTH)


def gelu() -> nn.Module:
    return Feedforward(functional.gelu)


def relu() -> nn.Module:
    return Feedforward(functional.relu)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "pre-LN, explicit softmax, GELU": (
        lambda: Network(lambda: Attention(plain=True), gelu, layer_norm),
        {"folded": 7, "mul": 2},
    ),
    "pre-LN, ReLU": (lambda: Network(Attention, relu, layer_norm), {"folded": 9}),
    "post-LN, GELU": (
        lambda: Network(Attention, gelu, layer_norm, first=False),
        {"folded": 3, "mul": 6},
    ),
    "fused qkv, SDPA, GELU": (
        lambda: Network(lambda: Attention(fused=True), gelu, layer_norm),
        {"folded": 7, "mul": 2},
    ),
    "RMSNorm, GQA 4/2, SwiGLU": (
        lambda: Network(lambda: Attention(groups=2), Gated, rms_norm),
        {"folded": 7, "tied": 2},
    ),
    "RMSNorm, MHA, SwiGLU": (lambda: Network(Attention, Gated, rms_norm), {"folded": 9}),
}
"""Networks and their groups: from the maths of each, two blocks and the head."""


class Scaled(nn.Module):
    """A gain for each channel takes scales on both sides (LayerScale)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x) * self.gain)


def program_of(model: nn.Module, inputs: object, *dynamic: str) -> Program:
    scramble(model)
    return apply(capture(model.eval(), inputs, dynamic=dynamic or ("batch",)), NORMAL)[0]


def ids(length: int = 6) -> Tensor:
    return torch.randint(0, WORDS, (3, length))


def groups(program: Program) -> tuple[ScaleGroup, ...]:
    return program.get(find_scales).groups
