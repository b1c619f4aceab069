"""Pruning under causal attention: the last token says what matters, and order is kept."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from effopt.attention import SDPA
from effopt.causal import hides_later, looks_back, own_calls
from effopt.kernel import kernel
from effopt.sites import find_tokens
from tests.check import Check
from tests.eager import Tokens, prune
from tests.spellings import WIDTH, Net, Read, ScaledBlock, every_token

ULPS = 32
"""Of the largest value. Measured over all cases here: at most 1.8."""

TOKENS = 12
LATER = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)
SPEC = "prune-tokens{keep=0.6}"


class CausalBlock(ScaledBlock):
    """Attention that is causal by a flag; the oracle hides what comes later by a table."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        attn, (b, n, c) = self.attn, x.shape
        qkv = attn.qkv(self.norm1(x)).reshape(b, n, 3, attn.heads, c // attn.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.gain1 * attn.proj(y.reshape(b, n, c))
        return x + self.gain2 * self.mlp(self.norm2(x))


def flagged() -> list[ScaledBlock]:
    return [CausalBlock() for _ in range(3)]


def masked() -> list[ScaledBlock]:
    return [ScaledBlock(bias=LATER) for _ in range(3)]


def boolean() -> list[ScaledBlock]:
    return [ScaledBlock(bias=LATER == 0) for _ in range(3)]


SPELLINGS = {"flag": flagged, "added": masked, "boolean": boolean}


def nets(name: str, read: Read) -> tuple[Check, Net]:
    """Return a checked net, and the net with tables for the oracle."""
    net = Net(read, blocks=SPELLINGS[name]())
    check = Check(net, torch.randn(2, TOKENS, WIDTH)).normal()
    for block in net.blocks:
        block.attn.bias = LATER.expand(2, -1, -1)
    return check, net


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_last_token_chooses_where_every_token_is_read(name: str) -> None:
    check, net = nets(name, every_token)
    step = prune(0.6, (-1,), 0, behind=1)
    x = torch.randn(3, TOKENS, WIDTH)
    steps = dict.fromkeys(range(3), step)
    want = net.oracle(x, steps, lambda net, tokens: net.head(tokens.whole()))
    check.run(SPEC).numbers(ULPS, inputs=(x,), want=want)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_model_that_picks_the_last_token(name: str) -> None:
    check, net = nets(name, lambda net, x: net.head(x[:, -1]))
    step = prune(0.6, (-1,), 0, behind=1)

    def read(net: Net, tokens: Tokens) -> Tensor:
        return net.head(tokens.x[:, -1])

    check.run(SPEC)
    for batch in (1, 5):
        x = torch.randn(batch, TOKENS, WIDTH)
        want = net.oracle(x, dict.fromkeys(range(3), step), read)
        check.numbers(ULPS, inputs=(x,), want=want)


def test_a_picked_token_says_what_matters_though_attention_is_causal() -> None:
    """Token 5 is read; it and those ahead of it stay, and it scores the others."""
    check, net = nets("added", lambda net, x: net.head(x[:, 5]))
    x = torch.randn(3, TOKENS, WIDTH)
    step = prune(0.6, (5,), 6)
    want = net.oracle(x, {0: step}, lambda net, tokens: net.head(tokens.x[:, 5]))
    check.run("prune-tokens{keep=0.6,sites=[0]}").numbers(ULPS, inputs=(x,), want=want)


def test_a_mask_loses_rows_and_columns_of_dropped_tokens() -> None:
    check, _ = nets("added", every_token)
    check.run("prune-tokens{keep=0.6,sites=[0]}")
    calls = check.program.module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    shapes = [tuple(call.args[3].meta["val"].shape)[-2:] for call in calls]
    assert shapes == [(12, 12), (8, 8), (8, 8)]


def test_the_scores_are_one_row_and_survivors_keep_their_order() -> None:
    check, _ = nets("flag", every_token)
    check.run(SPEC)
    nodes = [n for n in check.program.nodes() if n.op == "call_function"]
    rows = [n.args[4] for n in nodes if n.target is kernel("attention_row").op]
    ends = [n.args[2:] for n in nodes if n.target is kernel("select_tokens").op]
    assert rows == [[-1]] * 3
    assert ends == [(0, 1)] * 3


def mixed() -> Net:
    return Net(every_token, blocks=[CausalBlock(), ScaledBlock(), ScaledBlock(bias=LATER)])


def test_each_call_is_asked_by_itself() -> None:
    program = Check(mixed(), torch.randn(2, TOKENS, WIDTH)).normal().program
    calls = [node for node in program.nodes() if node.target is SDPA]
    assert [hides_later(program, call) for call in calls] == [True, False, True]
    assert own_calls(*program.get(find_tokens)) == calls


def test_what_looks_back() -> None:
    def asked(net: nn.Module) -> bool:
        program = Check(net, torch.randn(2, TOKENS, WIDTH)).normal().program
        return looks_back(program, *program.get(find_tokens))

    assert all(asked(Net(every_token, blocks=made())) for made in SPELLINGS.values())
    assert not asked(Net(every_token))
    assert not asked(mixed())
    window = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(2)
    assert not asked(Net(every_token, blocks=[ScaledBlock(bias=window) for _ in range(2)]))
