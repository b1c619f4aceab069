"""What follows a merge: positions, attention pooling, masked means, layouts of outputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

from effopt.errors import PreconditionError
from tests import spellings
from tests.check import Check
from tests.eager import Step, Tokens, encode, merge
from tests.spellings import HEADS, WIDTH, Net, ScaledBlock

ULPS = 16
"""Of the largest value: K for dot products of K = 16 terms; both sides in single precision.
Measured: at most 3."""

STEPS: dict[int, Step] = dict.fromkeys(range(3), merge(3))
Shape = tuple[int, ...]


def random(model: nn.Module) -> Any:
    with torch.no_grad():
        for path, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in path and path.endswith("weight") else 0.0, 0.3)
    return model.eval()


def blocks_of(net: Net) -> list[Any]:
    return [block.block() for block in net.blocks]


class Rotated(nn.Module):
    """Three blocks with rotary positions, the same for all samples, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.up = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.register_buffer("speed", torch.tensor([1.0, 0.5, 0.2, 0.1]))

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        for _ in range(3):
            q, k, v = self.heads(x, place.float())
            x = x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
            x = x + self.up(x).tanh()
        return x.mean(1)

    def heads(self, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        turn = (place.unsqueeze(-1) * self.speed).repeat(*[1] * place.ndim, 2)
        turn = turn if turn.ndim == 2 else turn.unsqueeze(1)
        q, k, v = (
            layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        return self.rotate(q, turn), self.rotate(k, turn), v

    def rotate(self, x: Tensor, turn: Tensor) -> Tensor:
        low, high = x[..., :4], x[..., 4:]
        return x * turn.cos() + torch.cat([-high, low], -1) * turn.sin()

    def oracle(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        tokens = Tokens(x, torch.ones(len(x), n), torch.arange(n).expand(len(x), n))
        for block in range(3):
            q, k, v = self.heads(tokens.x, tokens.place.float())
            logits = q @ k.transpose(2, 3) / k.shape[-1] ** 0.5
            weights = (logits + tokens.size.log()[:, None, None, :]).softmax(-1)
            tokens.x = tokens.x + self.out((weights @ v).transpose(1, 2).flatten(2))
            tokens = STEPS[block](tokens, k, weights)
            tokens.x = tokens.x + self.up(tokens.x).tanh()
        return tokens.mean(tokens.x)


def test_rotary_positions_are_those_of_the_representatives() -> None:
    model = random(Rotated())
    x = torch.randn(3, 12, WIDTH)
    check = Check(model, torch.randn(2, 12, WIDTH)).normal().run("merge-tokens{r=3}")
    with torch.no_grad():
        check.numbers(ULPS, inputs=(x,), want=(model.oracle(x),))


def test_a_bias_computed_from_distances_is_gathered() -> None:
    class Distant(Net):
        def __init__(self) -> None:
            super().__init__(spellings.mean)
            self.table = nn.Embedding(5, HEADS)

        def forward(self, x: Tensor) -> Tensor:
            bias = self.bias(x.shape[1])
            for block in self.blocks:
                h = block.norm1(x)
                q, k, v = (
                    block.attn.part(place)(h).unflatten(2, (HEADS, -1)).transpose(1, 2)
                    for place in range(3)
                )
                y = attend(q, k, v, bias).transpose(1, 2).flatten(2)
                x = x + block.gain1 * block.attn.proj(y)
                x = x + block.gain2 * block.mlp(block.norm2(x))
            return self.read(self, x)

        def bias(self, n: int) -> Tensor:
            place = torch.arange(n)
            bucket = (place[None, :] - place[:, None]).clamp(-2, 2) + 2
            return self.table(bucket).permute(2, 0, 1).unsqueeze(0)

    net = random(Distant())
    x = torch.randn(3, 12, WIDTH)
    check = Check(net, torch.randn(2, 12, WIDTH)).normal().run("merge-tokens{r=3}")
    for block in net.blocks:
        block.attn.bias = net.bias(12)[0].detach()
    want = net.oracle(x, STEPS, lambda net, tokens: net.head(tokens.mean(tokens.x)))
    check.numbers(ULPS, inputs=(x,), want=want)


class Probe(nn.Module):
    """Attention pooling: a learned query attends to all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.ones(1, 1, WIDTH))
        self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query.expand(x.shape[0], -1, -1)
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (q, self.k(x), self.v(x)))
        return attend(q, k, v).transpose(1, 2).flatten(1)


def test_attention_pooling_counts_merged_tokens_as_often_as_they_are() -> None:
    net = Net(lambda net, x: net.head(net.probe(x)))
    net.probe = random(Probe())
    x = torch.randn(3, 12, WIDTH)
    check = Check(net, torch.randn(2, 12, WIDTH)).normal().run("merge-tokens{r=3}")
    with torch.no_grad():
        tokens = encode(x, None, blocks_of(net), STEPS)
        rows = [
            net.probe(row.repeat_interleave(size.long(), 0)[None])
            for row, size in zip(tokens.x, tokens.size, strict=True)
        ]
        want = net.head(torch.cat(rows))
    check.numbers(ULPS, inputs=(x,), want=(want,))


def _pooled(net: Net, x: Tensor) -> Tensor:
    query = net.query.expand(x.shape[0], -1, -1)
    return net.pool(query, x, x, need_weights=False)[0][:, 0]


def test_attention_pooling_by_torchs_own_module() -> None:
    """Query, key and value projections of nn.MultiheadAttention are parts of one weight."""
    net = Net(lambda net, x: net.head(_pooled(net, x)))
    net.query = nn.Parameter(torch.randn(1, 1, WIDTH))
    net.pool = random(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    x = torch.randn(3, 12, WIDTH)
    check = Check(net, torch.randn(2, 12, WIDTH)).normal().run("merge-tokens{r=3}")
    with torch.no_grad():
        tokens = encode(x, None, blocks_of(net), STEPS)
        rows = [
            row.repeat_interleave(size.long(), 0)[None]
            for row, size in zip(tokens.x, tokens.size, strict=True)
        ]
        want = torch.cat([net.read(net, row) for row in rows])
    check.numbers(ULPS, inputs=(x,), want=(want,))


def _by_count(x: Tensor, mask: Tensor) -> Tensor:
    kept = mask.unsqueeze(-1).to(x.dtype)
    return (x * kept).sum(1) / kept.sum(1).clamp(min=1e-9)


def _by_expansion(x: Tensor, mask: Tensor) -> Tensor:
    kept = mask.unsqueeze(-1).expand(x.size()).to(x.dtype)
    return torch.sum(x * kept, 1) / torch.clamp(kept.sum(1), min=1e-9)


def _by_filling(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1) / mask.sum(1, keepdim=True)


class Masked(nn.Module):
    """An encoder of padded sequences whose output is a mean over real tokens."""

    def __init__(self, pool: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ScaledBlock() for _ in range(3)])
        self.pool = pool

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return self.pool(x, mask)


@pytest.mark.parametrize("pool", [_by_count, _by_expansion, _by_filling])
def test_means_over_real_tokens_as_in_sentence_encoders(
    pool: Callable[[Tensor, Tensor], Tensor],
) -> None:
    model = random(Masked(pool))
    mask = torch.arange(12)[None] < torch.tensor([[12], [7], [9]])
    x = torch.randn(3, 12, WIDTH)
    check = Check(model, (x[:2], mask[:2])).normal().run("merge-tokens{r=3}")
    blocks = [block.block() for block in model.blocks]
    with torch.no_grad():
        tokens = encode(x, mask, blocks, dict.fromkeys(range(3), merge(3, ordered=True)))
        want = tokens.mean(tokens.x)
    check.numbers(ULPS, inputs=(x, mask), want=(want,))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(1, 0, 2),
        lambda x: x.unsqueeze(1),
        lambda x: x[..., 0],
        lambda x: x.argmax(-1),
        lambda x: x > 0,
        lambda x: x[:, 2:-1],
        lambda x: x.unflatten(2, (4, 4)),
    ],
    ids=["BCN", "NBC", "B1NC", "BN", "argmax", "bool", "inner", "cut-channels"],
)
def test_outputs_of_every_layout_are_restored(read: Callable[[Tensor], Tensor]) -> None:
    net = Net(lambda net, x: read(x))
    x = torch.randn(3, 12, WIDTH)
    check = Check(net, torch.randn(2, 12, WIDTH)).normal()
    protected = 2 if read(torch.zeros(1, 12, 16)).shape[1] == 9 else 0
    steps = dict.fromkeys(range(3), merge(3, protected, behind=protected // 2))
    check.run("merge-tokens{r=3}")
    with torch.no_grad():
        want = read(encode(x, None, blocks_of(net), steps).whole())
    (got,) = check.program.run((x,))
    if got.is_floating_point():
        check.numbers(ULPS, inputs=(x,), want=(want,))
    else:
        assert torch.equal(got, want)


def test_an_output_of_tokens_mixed_with_channels_is_restored_or_refused() -> None:
    net = Net(lambda net, x: x.flatten(1))
    check = Check(net, torch.randn(2, 12, WIDTH)).normal()
    try:
        check.run("merge-tokens{r=3}")
    except PreconditionError:
        return
    x = torch.randn(3, 12, WIDTH)
    with torch.no_grad():
        want = encode(x, None, blocks_of(net), STEPS).whole().flatten(1)
    check.numbers(ULPS, inputs=(x,), want=(want,))


def test_a_mean_added_back_to_the_tokens_in_the_middle() -> None:
    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            x = x + x.mean(1, keepdim=True)
            return self.read(self, self.blocks[2](self.blocks[1](x)))

    net = Shared(spellings.every_token)
    x = torch.randn(3, 12, WIDTH)
    check = Check(net, torch.randn(2, 12, WIDTH)).normal().run("merge-tokens{r=3,sites=[0]}")
    with torch.no_grad():
        blocks = blocks_of(net)
        tokens = encode(x, None, blocks[:1], STEPS)
        rest = encode(tokens.x + tokens.mean(tokens.x)[:, None], tokens.size, blocks[1:], {})
        want = net.head(tokens.undo[0](rest.x))
    check.numbers(ULPS, inputs=(x,), want=(want,))


def test_frames_of_a_video_beside_the_batch() -> None:
    """[B, S, N, C] is read as B·S samples, then as B again."""
    net = Net(
        lambda net, x: net.head(x.mean(1)).unflatten(0, (-1, 2)).mean(1),
        lambda net, x: x.flatten(0, 1),
    )
    x = torch.randn(3, 2, 12, WIDTH)
    check = Check(net, torch.randn(2, 2, 12, WIDTH)).normal().run("merge-tokens{r=3}")
    with torch.no_grad():
        tokens = encode(x.flatten(0, 1), None, blocks_of(net), STEPS)
        want = net.head(tokens.mean(tokens.x)).unflatten(0, (-1, 2)).mean(1)
    check.numbers(ULPS, inputs=(x,), want=(want,))
