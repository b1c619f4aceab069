"""A model from its row of choices: embeddings, blocks with hostile operators, and a head."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.blocks import Block
from tests.fuzz.heads import EOS, Head, Seen
from tests.fuzz.hostile import OPERATORS
from tests.fuzz.masks import MASKS, zeroed
from tests.fuzz.rotary import angles
from tests.fuzz.spec import Spec
from tests.fuzz.stages import Stage

VOCABULARY, LONGEST = 30, 24
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
        self.blocks = nn.ModuleList(Block(spec, self.windows(n)) for n in range(spec.depth))
        self.stage = Stage(spec) if spec.stage != "none" else None
        self.head = Head(spec)

    def windows(self, number: int) -> bool:
        """Tell whether a block attends in windows."""
        wanted = {"none": False, "first": number == 0, "others": number != self.spec.depth - 1}
        return wanted[self.spec.window]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        ids, x = x, self.placed(self.tokens(x))
        x, hidden = self.blocked(x, mask)
        return self.read(x, hidden, ids, mask)

    def tokens(self, x: Tensor) -> Tensor:
        """Embed the first input."""
        y = self.embed(x)
        if self.spec.source == "vision":
            y = y.flatten(2).transpose(1, 2)
        if self.kinds is not None:
            y = y + self.kinds(torch.arange(y.shape[1], device=y.device) % 2)
        return y

    def placed(self, y: Tensor) -> Tensor:
        """Add learned tokens and positions."""
        spec, b = self.spec, y.shape[0]
        if self.front is not None:
            wide = spec.front_by == "expand"
            front = self.front.expand(b, -1, -1) if wide else self.front.repeat(b, 1, 1)
            y = torch.cat((front, y), dim=1)
        if self.back is not None:
            y = torch.cat((y, self.back.expand(b, -1, -1)), dim=1)
        place = self.positions(y.shape[1])
        return y if place is None else y + place

    def positions(self, count: int) -> Tensor | None:
        """Make the table of positions that is added, [1, N, C]."""
        if self.spec.position == "learned":
            return self.place[:, :count]
        if self.spec.position == "embedding":
            return self.places(torch.arange(count)[None])
        if self.spec.position == "sinus":
            speed = 10.0 ** (torch.arange(self.spec.width) / 4)
            return (torch.arange(count)[:, None] / speed).sin()
        return None

    def blocked(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks; return the last hidden state, and all of them."""
        spec = self.spec
        x = zeroed(spec.zero, x, mask, self.head.probe)
        extra = self.place[:, : x.shape[1]] if spec.position == "late" else None
        hidden, bias = [x], MASKS[spec.mask](spec, x, mask)
        for number, block in enumerate(self.blocks):
            if self.stage is not None and number == spec.depth // 2:
                x = self.stage(x)
                bias = MASKS[spec.mask](spec, x, mask)
            y = x.transpose(0, 1) if spec.tokens_first else x
            y = block(y, bias, angles(spec, y))
            x = y.transpose(0, 1) if spec.tokens_first else y
            for place, name in spec.hostile:
                if place == number:
                    x = OPERATORS[name](x, hidden[0], self.table)
            if spec.zero.endswith("each"):
                x = zeroed(spec.zero, x, mask, self.head.probe)
            if extra is not None and number == 0:
                x = x + extra
            hidden.append(x)
        return x, hidden

    def read(self, x: Tensor, hidden: list[Tensor], ids: Tensor, mask: Tensor | None) -> Any:
        """Run the head."""
        x = self.head.norm(x) if self.spec.final_norm else x
        return self.head(Seen(x, hidden, ids, mask))


class Pair(Model):
    """Two inputs: a decoder reads the first by cross-attention, or each stands alone, or joined."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.words = nn.Embedding(VOCABULARY, spec.width)
        own = _decoder(spec)
        crossed = spec.tower in ("same", "other")
        self.decoder = nn.ModuleList(Block(own, crossed=crossed) for _ in range(spec.depth))
        self.other = nn.Parameter(torch.randn(1, spec.targets, spec.width))

    def forward(  # type: ignore[override]
        self, x: Tensor, target: Tensor, mask: Tensor | None = None
    ) -> Any:
        if self.spec.tower == "joined":
            return self.joined(x, target, mask)
        if self.spec.tower == "same":
            y, place = self.tokens(x), self.positions(self.spec.own)
            words = self.words(target)
            first, second = (y, words) if place is None else (y + place, words + place)
        else:
            first, second = self.placed(self.tokens(x)), self.words(target) + self.other
        memory, hidden = self.blocked(first, mask)
        decoded = self.decoded(second, memory, mask)
        own = self.read(memory, hidden, target, mask) if self.spec.tower == "dual" else ()
        return own, self.read(decoded, [second, decoded], target, mask)

    def joined(self, x: Tensor, target: Tensor, mask: Tensor | None) -> Any:
        """Attend over both inputs at once."""
        both = torch.cat([self.tokens(x), self.words(target)], dim=1)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(target)], dim=1)
        y, hidden = self.blocked(self.placed(both), mask)
        return self.read(y, hidden, x, mask)

    def decoded(self, y: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Run the second tower."""
        spec = self.spec
        seen = None if mask is None else MASKS["bool"](spec, memory, mask)
        own = MASKS[_decoder(spec).mask](spec, y, None)
        for block in self.decoder:
            y = block(y, own, angles(spec, y), memory, seen)
        return y


def _decoder(spec: Spec) -> Spec:
    """Return how a decoder's blocks are spelled: its own tokens have no padding."""
    own = spec.mask in ("causal", "tril", "triu_inf", "alibi")
    qkv = "grouped" if spec.qkv == "grouped" else "separate"
    return replace(spec, mask=spec.mask if own else "none", qkv=qkv, window="none")


def make(spec: Spec) -> Model:
    """Make the model with random weights: gains are not 1, offsets not 0."""
    torch.manual_seed(spec.seed)
    model = Model(spec) if spec.tower == "none" else Pair(spec)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            gain = 1.0 if "norm" in path and path.endswith("weight") else 0.0
            spread = 0.3 if weight.ndim == 1 else 0.35
            weight.normal_(gain, spread)
    return model.eval()


def draw(spec: Spec, batch: int, length: int | None = None, seed: int = 0) -> Inputs:
    """Draw inputs; masks hide the ends of rows, and each text has one end of sentence."""
    dice = torch.Generator().manual_seed(1000 * spec.seed + 10 * batch + seed)
    count = length or spec.own
    inputs: list[Tensor] = []
    if spec.source == "vision":
        size = (2 * spec.grid[0], 2 * spec.grid[1])
        inputs.append(torch.randn(batch, 3, *size, generator=dice))
    elif spec.source == "text":
        inputs.append(_words(batch, count, dice))
    else:
        inputs.append(torch.randn(batch, count, 6, generator=dice))
    if spec.tower != "none":
        inputs.append(_words(batch, spec.targets, dice))
    if spec.takes_mask:
        ends = count - torch.arange(batch) % 3
        inputs.append((torch.arange(count)[None] < ends[:, None]).long())
    return tuple(inputs)


def _words(batch: int, count: int, dice: torch.Generator) -> Tensor:
    x = torch.randint(EOS + 1, VOCABULARY, (batch, count), generator=dice)
    x[torch.arange(batch), torch.arange(batch) % count] = EOS
    return x
