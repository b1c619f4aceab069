"""What merging must leave true whatever the weights: batches, duplicates, permutations."""

import pytest
import torch
from torch import Tensor, nn

from effopt.program import Program
from tests import spellings, zoo
from tests.blocks import blocks_of_torch
from tests.check import Check, agree
from tests.eager import encode, merge
from tests.programs import apply, draw, reduced, run
from tests.spellings import Net

ULPS = 16
"""Of the largest value: K for dot products of K = 16 terms. Measured: at most 4."""


@pytest.mark.parametrize("name", ["vit", "deit", "bert", "bert_tokens", "encoder_padded"])
def test_a_sample_alone_gives_its_row(name: str) -> None:
    program, _ = reduced(name, "merge-tokens{r=3}")
    inputs = draw(name, 5)
    together = run(program, inputs)
    for row in range(5):
        alone = run(program, {key: x[row : row + 1] for key, x in inputs.items()})
        agree(alone, [out[row : row + 1] for out in together], ULPS)


def test_equal_tokens_merge_without_a_trace() -> None:
    net = Net(spellings.every_token)
    x = torch.randn(3, 6, 16).repeat_interleave(2, dim=1)
    check = Check(net, torch.randn(2, 12, 16)).normal().run("merge-tokens{r=4,sites=[0]}")
    check.numbers(ULPS, inputs=(x,), want=(net(x).detach(),))
    blind, _ = apply(
        Check(net, x).normal().program, "merge-tokens{r=4,sites=[0],proportional=false}"
    )
    assert (blind.run((x,))[0] - net(x)).abs().max() > 1e-2, "sizes would not matter"


def test_all_tokens_equal_merge_without_a_trace_at_every_site() -> None:
    net = Net(spellings.every_token)
    x = torch.randn(3, 1, 16).expand(-1, 12, -1).contiguous()
    check = Check(net, torch.randn(2, 12, 16)).normal().run("merge-tokens{r=4}")
    check.noted("block 0: 12 -> 8 tokens", "block 1: 8 -> 4 tokens", "block 2: 4 -> 2 tokens")
    check.numbers(ULPS, inputs=(x,), want=(net(x).detach(),))


def test_zero_tokens_give_no_nan() -> None:
    net = Net(spellings.every_token)
    check = Check(net, torch.randn(2, 12, 16)).normal().run("merge-tokens{r=4}")
    with torch.no_grad():
        for block in net.blocks:
            block.attn.qkv.bias.zero_()
            block.norm1.bias.zero_()
    zero = torch.zeros(2, 12, 16)
    check.numbers(ULPS, inputs=(zero,), want=(net(zero).detach(),))


def _shuffled() -> Tensor:
    """Return an order of twelve places that keeps even places even."""
    order = torch.arange(12)
    order[::2] = order[::2][torch.randperm(6)]
    order[1::2] = order[1::2][torch.randperm(6)]
    return order


def test_order_inside_even_and_inside_odd_places_does_not_matter_at_one_site() -> None:
    pooled, each = Net(spellings.mean), Net(spellings.every_token)
    x, order = torch.randn(3, 12, 16), _shuffled()
    spec = "merge-tokens{r=3,sites=[1]}"
    for net, turn in ((pooled, False), (each, True)):
        program = Check(net, torch.randn(2, 12, 16)).normal().run(spec).program
        want = program.run((x,))[0]
        got = program.run((x[:, order],))[0]
        agree([got], [want[:, order] if turn else want], ULPS)


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
def test_a_plain_transformer_encoder(norm_first: bool, padded: bool) -> None:
    model = _random(zoo.Encoder(norm_first))
    padding = torch.arange(12)[None] >= torch.tensor([[12], [8], [9]])
    x = torch.randn(3, 12, 32)
    given = (x[:2], padding[:2]) if padded else (x[:2],)
    check = Check(model, given).normal().run("merge-tokens{r=[3,2,1]}")
    real = ~padding if padded else None
    blocks = blocks_of_torch(model.encoder)
    steps = {block: merge(3 - block, ordered=padded) for block in range(3)}
    with torch.no_grad():
        want = encode(x, real, blocks, steps).whole()
    got = check.program.run((x, padding) if padded else (x,))[0]
    assert got.isfinite().all()
    seen = padding if padded else torch.zeros_like(padding)
    agree([got[~seen]], [want[~seen]], 2 * ULPS)


def _random(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for path, weight in model.named_parameters():
            gain = 1.0 if "norm" in path and path.endswith("weight") else 0.0
            weight.normal_(gain, 0.2)
    return model.eval()


class TokensFirst(nn.Module):
    """An encoder whose residual stream is [N, B, C], in its own words."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.up = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        for _ in range(3):
            x = self.block(x)
        return x.mean(0)

    def block(self, x: Tensor) -> Tensor:
        n, b, _ = x.shape
        q, k, v = (
            layer(x).reshape(n, b * 2, 8).transpose(0, 1).reshape(b, 2, n, 8)
            for layer in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.permute(2, 0, 1, 3).reshape(n, b, 16))
        return x + self.up(x).tanh()


class BatchFirst(TokensFirst):
    """The same maths with the residual stream [B, N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x.transpose(0, 1)).transpose(0, 1)
        return x.mean(1)

    def block(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        q, k, v = (
            layer(x).unflatten(2, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return (x + self.up(x).tanh()).transpose(0, 1)


def test_a_residual_stream_with_tokens_first() -> None:
    model = _random(TokensFirst())
    other = BatchFirst()
    other.load_state_dict(model.state_dict())
    programs: list[Program] = []
    for net in (model, other):
        check = Check(net, torch.randn(2, 12, 16)).normal().run("merge-tokens{r=3}")
        check.noted("block 0: 12 -> 9 tokens", "block 1: 9 -> 6 tokens", "block 2: 6 -> 3 tokens")
        programs.append(check.program)
    x = torch.randn(5, 12, 16)
    agree(programs[0].run((x,)), programs[1].run((x,)), ULPS)


def test_torch_encoder_with_tokens_first() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, norm_first=True)
    inner = _random(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    check = Check(Turned(), torch.randn(2, 12, 32)).normal().run("merge-tokens{r=3}")
    x = torch.randn(4, 12, 32)
    with torch.no_grad():
        want = encode(x, None, blocks_of_torch(inner), dict.fromkeys(range(3), merge(3)))
    check.numbers(2 * ULPS, inputs=(x,), want=(want.whole(),))


def test_inputs_that_come_tokens_first() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64)
    inner = _random(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
    x = torch.randn(12, 2, 32)
    check = Check(inner, x, dynamic=()).normal().run("merge-tokens{r=3}")
    check.noted("block 0: 12 -> 9 tokens", "block 1: 9 -> 6 tokens", "block 2: 6 -> 3 tokens")
    with torch.no_grad():
        steps = dict.fromkeys(range(3), merge(3))
        want = encode(x.transpose(0, 1), None, blocks_of_torch(inner), steps).whole()
    check.numbers(2 * ULPS, want=(want.transpose(0, 1),))
