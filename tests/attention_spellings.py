"""Attention as models write it out: many spellings of one call, each a layer of a model."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax

from tests.check import Check

FIRST = "canonicalize,fold-constants"
SPEC = "unify-attention"
ROWS, TOKENS, HEADS, WIDTH = 2, 6, 2, 4
LOW = torch.finfo(torch.float32).min
Attend = Callable[["Block", Tensor, Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Attention between projections; `attend` spells what happens to q, k, v [B, H, N, D]."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.table = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS))
        self.register_buffer("causal", torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())
        self.register_buffer("root", torch.tensor(2.0))
        self.register_buffer("low", torch.tensor(LOW))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2) for part in parts)
        y = self.attend(self, q, k, v, keep)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


def hidden(keep: Tensor) -> Tensor:
    """The keys that no query may see, [B, 1, 1, N]."""
    return ~keep[:, None, None, :]


def additive(keep: Tensor) -> Tensor:
    return (1 - keep[:, None, None, :].float()) * LOW


def flat(x: Tensor) -> Tensor:
    """[B, H, N, D] to [B · H, N, D]."""
    return x.reshape(-1, *x.shape[2:])


def apart(x: Tensor) -> Tensor:
    return x.view(-1, HEADS, *x.shape[1:])


def masked_and_flat(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Products in three dimensions, the mask in four, as BART had it."""
    logits = torch.bmm(flat(q), flat(k).transpose(1, 2)) / 2
    logits = flat(apart(logits) + additive(keep))
    return apart(torch.bmm(softmax(logits, -1), flat(v)))


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """Bloom: the bias is the first argument of the product."""
    logits = (
        slopes.expand(q.shape[0], -1, -1, -1)
        .reshape(q.shape[0] * HEADS, 1, TOKENS)
        .baddbmm(batch1=flat(q), batch2=flat(k).transpose(1, 2), beta=1.0, alpha=0.5)
    )
    return apart(torch.bmm(softmax(apart(logits), -1).reshape(-1, TOKENS, TOKENS), flat(v)))


def steady(logits: Tensor) -> Tensor:
    return (logits - logits.amax(-1).unsqueeze(-1)).softmax(-1)


SPELLINGS: dict[str, Attend] = {
    "scale after": lambda m, q, k, v, _: softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v,
    "division": lambda m, q, k, v, _: softmax(q @ k.mT / math.sqrt(WIDTH), -1) @ v,
    "another scale": lambda m, q, k, v, _: softmax(0.3 * (q @ k.mT), -1) @ v,
    "scale on q": lambda m, q, k, v, _: softmax((q * 0.5) @ k.mT, -1) @ v,
    "scale on both": lambda m, q, k, v, _: softmax((q / 2**0.5) @ (k / 2**0.5).mT, -1) @ v,
    "scale on k^T": lambda m, q, k, v, _: softmax(q @ (k.mT / m.root), -1) @ v,
    "a temperature for each head": lambda m, q, k, v, _: (
        softmax(q @ k.mT * m.table[0, :, :1, :1].exp() + m.table, -1) @ v
    ),
    "scale as a tensor": lambda m, q, k, v, _: softmax(q @ k.mT / m.root, -1) @ v,
    "k^T by permute": lambda m, q, k, v, _: (
        softmax(q @ k.transpose(1, 2).permute(0, 2, 3, 1) / 2, -1) @ v
    ),
    "additive padding": lambda m, q, k, v, keep: softmax(q @ k.mT / 2 + additive(keep), -1) @ v,
    "mask first": lambda m, q, k, v, keep: softmax(additive(keep) + q @ k.mT / 2, -1) @ v,
    "masked_fill": lambda m, q, k, v, keep: (
        softmax((q @ k.mT / 2).masked_fill(hidden(keep), -torch.inf), -1) @ v
    ),
    "two masks": lambda m, q, k, v, keep: (
        softmax(torch.where(m.causal, q @ k.mT / 2, m.low).masked_fill(hidden(keep), LOW), -1) @ v
    ),
    "causal table": lambda m, q, k, v, _: (
        softmax(torch.where(m.causal, q @ k.mT / 2, -1e9), -1) @ v
    ),
    "a mask for each query": lambda m, q, k, v, keep: (
        softmax(q @ k.mT / 2 + additive(keep).expand(-1, 1, TOKENS, -1) * 1.0, -1) @ v
    ),
    "relative bias": lambda m, q, k, v, _: softmax(q @ k.mT / 2 + m.table, -1) @ v,
    "scale after the bias": lambda m, q, k, v, _: softmax((q @ k.mT + m.table) / 2, -1) @ v,
    "a bias subtracted": lambda m, q, k, v, _: softmax(q @ k.mT / 2 - m.table[0], -1) @ v,
    "bias and mask": lambda m, q, k, v, keep: (
        softmax((q @ k.mT / 2 + m.table).masked_fill(hidden(keep), LOW), -1) @ v
    ),
    "clamped": lambda m, q, k, v, keep: (
        softmax(torch.max(q @ k.mT / 2 + additive(keep), m.low), -1) @ v
    ),
    "float32 softmax": lambda m, q, k, v, _: (
        softmax((q @ k.mT / 2).float(), -1, dtype=torch.float32).type_as(q) @ v
    ),
    "own maximum": lambda m, q, k, v, _: steady(q @ k.mT / 2) @ v,
    "3-D": lambda m, q, k, v, _: apart(
        torch.bmm(softmax(torch.bmm(flat(q), flat(k).mT) / 2, -1), flat(v))
    ),
    "3-D with a mask in 4-D": lambda m, q, k, v, keep: masked_and_flat(q, k, v, keep),
    "baddbmm": lambda m, q, k, v, _: alibi(q, k, v, m.table[:, :, :1]),
    "einsum": lambda m, q, k, v, _: torch.einsum(
        "bhqk,bhkd->bhqd", softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / 2, -1), v
    ),
    "einsum, tokens first": lambda m, q, k, v, _: torch.einsum(
        "bnij,jbnd->ibnd",
        softmax(
            torch.einsum("ibnd,jbnd->bnij", q.permute(2, 0, 1, 3), k.permute(2, 0, 1, 3)) / 2, -1
        ),
        v.permute(2, 0, 1, 3),
    ).permute(1, 2, 0, 3),
    "repeated heads": lambda m, q, k, v, _: (
        softmax(q @ k[:, :1].repeat_interleave(HEADS, 1).mT / 2, -1)
        @ v[:, :1].repeat_interleave(HEADS, 1)
    ),
    "expanded heads": lambda m, q, k, v, _: (
        softmax(q @ k[:, :1].expand(-1, HEADS, -1, -1).mT / 2, -1) @ v
    ),
    "one head of keys": lambda m, q, k, v, _: softmax(q @ k[:, :1].mT / 2, -1) @ v[:, :1],
}


class Whole(nn.Module):
    """Attention over tokens [B, N, C], with projections of its own."""

    def __init__(self, attend: "Callable[[Whole, Tensor], Tensor]") -> None:
        super().__init__()
        self.attend = attend
        self.width = HEADS * WIDTH
        self.qkv = nn.Linear(self.width, 3 * self.width)
        self.module = nn.MultiheadAttention(self.width, HEADS, batch_first=True)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return x + self.attend(self, x)


def unbound(model: Whole, x: Tensor) -> Tensor:
    joint = model.qkv(x).reshape(x.shape[0], TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    q, k, v = joint.unbind(0)
    return (softmax(q @ k.mT / 2, -1) @ v).transpose(1, 2).reshape(x.shape)


def single(model: Whole, x: Tensor) -> Tensor:
    q, k, v = model.qkv(x).split(model.width, -1)
    return softmax(q @ k.transpose(1, 2) / model.width**0.5, -1) @ v


WHOLE: dict[str, Callable[[Whole, Tensor], Tensor]] = {
    "fused projection, unbound": unbound,
    "a single head in 3-D": single,
    "a 3-D call": lambda m, x: scaled_dot_product_attention(*m.qkv(x).chunk(3, -1)),
    "MultiheadAttention": lambda m, x: m.module(x, x, x, need_weights=False)[0],
    "MultiheadAttention, weights unread": lambda m, x: m.module(x, x, x)[0],
}


class Stack(nn.Module):
    """Layers that share a mask."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, keep)
        return x


def made(name: str) -> nn.Module:
    """Two layers of one spelling."""
    torch.manual_seed(0)
    layer: Callable[[], nn.Module] = (
        (lambda: Block(SPELLINGS[name])) if name in SPELLINGS else (lambda: Whole(WHOLE[name]))
    )
    return Stack(layer(), layer())


def drawn(rows: int) -> tuple[Tensor, Tensor]:
    ends = torch.tensor((6, 4, 5, 3, 6))[-rows:]
    return torch.randn(rows, TOKENS, HEADS * WIDTH), torch.arange(TOKENS)[None] < ends[:, None]


def one(attend: Attend) -> Check:
    """One layer of a spelling that has no name here, ready for the pass."""
    torch.manual_seed(0)
    return Check(Block(attend), drawn(ROWS)).run(FIRST)
