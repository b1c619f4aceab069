"""A model from its row of choices: embeddings, blocks with hostile operators, and a head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.blocks import Block, norm
from tests.fuzz.hostile import OPERATORS
from tests.fuzz.spec import Spec

VOCABULARY, LONGEST, EOS = 30, 24, 2
Inputs = tuple[Tensor, ...]


class Model(nn.Module):
    """Takes an image, or token ids (with a mask), or embeddings (with a mask)."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, width = spec, spec.width
        if spec.source == "vision":
            self.embed: nn.Module = nn.Conv2d(3, width, 2, 2)
        else:
            self.embed = (
                nn.Embedding(VOCABULARY, width) if spec.source == "text" else nn.Linear(6, width)
            )
        self.kinds = nn.Embedding(2, width) if spec.types else None
        self.front = nn.Parameter(torch.randn(1, spec.front, width)) if spec.front else None
        self.back = nn.Parameter(torch.randn(1, spec.back, width)) if spec.back else None
        longest = max(spec.count, LONGEST) if spec.free_length else spec.count
        self.place = nn.Parameter(torch.randn(1, longest, width))
        self.places = nn.Embedding(longest, width)
        self.table = nn.Parameter(torch.randn(spec.count, spec.count))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = norm("layer" if spec.norm == "none" else spec.norm, width)
        self.probe = nn.Parameter(torch.randn(1, 1, width))
        self.dense = nn.Conv2d(width, 3, 3, padding=1)
        self.classify = nn.Linear(width, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        spec, ids = self.spec, x
        x = self.tokens(x)
        if spec.position == "late":
            extra = self.place[:, : x.shape[1]]
        hidden = [x]
        bias = MASKS[spec.mask](self, x, mask)
        for number, block in enumerate(self.blocks):
            x = block(x, bias, self.rotary(x) if spec.position == "rotary" else None)
            for place, name in spec.hostile:
                if place == number:
                    x = OPERATORS[name](x, hidden[0], self.table)
            if spec.position == "late" and number == 0:
                x = x + extra
            hidden.append(x)
        if spec.final_norm:
            x = self.norm(x)
        return OUTS[spec.out](self, x, hidden, ids, mask)

    def tokens(self, x: Tensor) -> Tensor:
        spec = self.spec
        b = x.shape[0]
        y = self.embed(x)
        if spec.source == "vision":
            y = y.flatten(2).transpose(1, 2)
        if self.kinds is not None:
            kind = torch.arange(y.shape[1], device=y.device) % 2
            y = y + self.kinds(kind)
        if self.front is not None:
            front = (
                self.front.expand(b, -1, -1)
                if spec.front_by == "expand"
                else self.front.repeat(b, 1, 1)
            )
            y = torch.cat((front, y), dim=1)
        if self.back is not None:
            y = torch.cat((y, self.back.expand(b, -1, -1)), dim=1)
        if spec.position == "learned":
            y = y + self.place[:, : y.shape[1]]
        if spec.position == "embedding":
            y = y + self.places(torch.arange(y.shape[1], device=y.device)[None])
        if spec.position == "sinus":
            angle = torch.arange(y.shape[1])[:, None] / 10.0 ** (torch.arange(spec.width) / 4)
            y = y + angle.sin()
        return y

    def rotary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = self.spec.head // 2
        speed = 1.0 / 10.0 ** (torch.arange(half) / half)
        angle = torch.arange(x.shape[1], device=x.device)[:, None].float() * speed[None]
        angle = torch.cat([angle, angle], -1)
        return angle.cos()[None, None], angle.sin()[None, None]


Mask = Callable[[Model, Tensor, Tensor | None], Tensor | None]


def _bool(self: Model, x: Tensor, mask: Tensor | None) -> Tensor | None:
    assert mask is not None
    if self.spec.call == "mha":
        return mask == 0
    return mask.bool()[:, None, None]


def _bool_index(self: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    rows = torch.arange(x.shape[0])[:, None, None, None]
    columns = torch.arange(x.shape[1])[None, None, None]
    return (mask > 0)[rows, columns]


def _bool_expand(self: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    n = mask.shape[1]
    return mask.to(torch.bool).view(-1, 1, 1, n).expand(-1, 1, n, n)


def _additive(self: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    return (1.0 - mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min


def _tril(self: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    n = x.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    return seen if mask is None else seen & mask.bool()[:, None, None]


def _triu_inf(self: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    n = x.shape[1]
    return torch.full((n, n), -torch.inf).triu(1)


def _alibi(self: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    place = torch.arange(x.shape[1])
    slope = 0.5 ** torch.arange(1, self.spec.heads + 1)
    return -(place[:, None] - place[None]).abs()[None, None] * slope[:, None, None]


MASKS: dict[str, Mask] = {
    **dict.fromkeys(("none", "causal", "relative"), lambda self, x, mask: None),
    "bool": _bool,
    "bool_index": _bool_index,
    "bool_expand": _bool_expand,
    "additive": _additive,
    "tril": _tril,
    "triu_inf": _triu_inf,
    "alibi": _alibi,
}
MASKED = ("bool", "bool_index", "bool_expand", "additive")
"""Masks that need an input."""


def _masked_mean(self: Model, x: Tensor, h: list[Tensor], ids: Tensor, mask: Tensor | None) -> Any:
    assert mask is not None
    real = mask.unsqueeze(-1).to(x.dtype)
    return self.classify((x * real).sum(1) / real.sum(1).clamp(min=1e-9))


def _attention_pool(
    self: Model, x: Tensor, h: list[Tensor], ids: Tensor, mask: Tensor | None
) -> Any:
    probe = self.probe.expand(x.shape[0], -1, -1)
    return F.scaled_dot_product_attention(probe, x, x)[:, 0]


def _grid(self: Model, x: Tensor, h: list[Tensor], ids: Tensor, mask: Tensor | None) -> Any:
    rows, columns = self.spec.grid
    patches = x[:, self.spec.front : self.spec.front + rows * columns]
    return self.dense(patches.transpose(1, 2).reshape(x.shape[0], -1, rows, columns))


def _eos(self: Model, x: Tensor, h: list[Tensor], ids: Tensor, mask: Tensor | None) -> Any:
    place = (ids == EOS).int().argmax(dim=-1)
    return x[torch.arange(x.shape[0]), place]


Out = Callable[[Model, Tensor, list[Tensor], Tensor, Tensor | None], Any]
OUTS: dict[str, Out] = {
    "cls": lambda s, x, h, i, m: s.classify(x[:, 0]),
    "mean": lambda s, x, h, i, m: s.classify(x.mean(1)),
    "mean_patches": lambda s, x, h, i, m: s.classify(x[:, s.spec.front :].mean(dim=1)),
    "cls_mean": lambda s, x, h, i, m: torch.cat([x[:, 0], x[:, 1:].mean(1)], -1),
    "masked_mean": _masked_mean,
    "max": lambda s, x, h, i, m: s.classify(x.amax(1)),
    "min": lambda s, x, h, i, m: s.classify(x).amin(1),
    "sum": lambda s, x, h, i, m: x.sum(1),
    "attention_pool": _attention_pool,
    "softmax_pool": lambda s, x, h, i, m: (x * (x @ s.probe[0, 0]).softmax(1)[..., None]).sum(1),
    "tokens": lambda s, x, h, i, m: s.classify(x),
    "tokens_norm": lambda s, x, h, i, m: F.normalize(x, dim=-1),
    "patches": lambda s, x, h, i, m: (x[:, : s.spec.front], x[:, s.spec.front :]),
    "several": lambda s, x, h, i, m: {"tokens": x, "pooled": torch.tanh(s.classify(x[:, 0]))},
    "hidden": lambda s, x, h, i, m: (x, *h),
    "grid_conv": _grid,
    "last": lambda s, x, h, i, m: s.classify(x[:, -1]),
    "eos": _eos,
    "skip_mean": lambda s, x, h, i, m: s.norm(x + h[0] + h[1]).mean(1),
    "skip_tokens": lambda s, x, h, i, m: s.classify(torch.cat([x, h[0]], -1)[..., : s.spec.width]),
    "transposed": lambda s, x, h, i, m: x.transpose(1, 2),
    "gram": lambda s, x, h, i, m: x @ x.transpose(1, 2),
}
"""What becomes of the tokens."""


def takes_mask(spec: Spec) -> bool:
    return spec.mask in MASKED or spec.out == "masked_mean"


def make(spec: Spec) -> Model:
    """Make the model with random weights: gains are not 1, offsets not 0."""
    torch.manual_seed(spec.seed)
    model = Model(spec)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            gain = 1.0 if "norm" in path and path.endswith("weight") else 0.0
            spread = 0.3 if weight.ndim == 1 else 0.35
            weight.normal_(gain, spread)
    return model.eval()


def draw(spec: Spec, batch: int, length: int | None = None, seed: int = 0) -> Inputs:
    """Draw inputs; masks hide the ends of rows, and each text has one end of sentence."""
    dice = torch.Generator().manual_seed(1000 * spec.seed + 10 * batch + seed)
    count = length or spec.tokens
    if spec.source == "vision":
        return (torch.randn(batch, 3, 2 * spec.grid[0], 2 * spec.grid[1], generator=dice),)
    if spec.source == "text":
        x = torch.randint(3, VOCABULARY, (batch, count), generator=dice)
        x[torch.arange(batch), torch.arange(batch) % count] = EOS
    else:
        x = torch.randn(batch, count, 6, generator=dice)
    if not takes_mask(spec):
        return (x,)
    ends = count - torch.arange(batch) % 3
    return x, (torch.arange(count)[None] < ends[:, None]).long()
