"""Whole models in spellings that once went wrong: reduced rightly, or refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.functional import gelu, scaled_dot_product_attention

from effopt.program import module_path
from effopt.sites import find_tokens
from tests.check import Check
from tests.eager import Block, Step, merge, prune
from tests.oracle import faults, make_case
from tests.programs import apply
from tests.spellings import HEADS, WIDTH, Net, ParallelBlock, ScaledBlock, first_token

TOKENS, HEAD = 12, WIDTH // HEADS
MERGE, PRUNE = "merge-tokens{r=2}", "prune-tokens{keep=0.6,sites=[0,1]}"


def check_of(model: nn.Module, *shapes: tuple[int, ...]) -> Check:
    return Check(model, tuple(torch.randn(2, *shape) for shape in shapes)).normal()


def right(check: Check, spec: str) -> None:
    assert faults(make_case(check.original, check.program, spec)) == []


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (HEADS, HEAD)).transpose(1, 2)


class RotaryBlock(ScaledBlock):
    """Rotates the patches and not the class token: two pieces, joined again (EVA, DINOv3)."""

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(TOKENS - 1)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))
        first, rest = x[:, :, :1], x[:, :, 1:]
        half = torch.cat([-rest[..., HEAD // 2 :], rest[..., : HEAD // 2]], -1)
        return torch.cat([first, rest * cos + half * sin], dim=2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (heads(part) for part in self.attn.qkv(self.norm1(x)).chunk(3, -1))
        y = scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        x = x + self.attn.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("spec", [MERGE, PRUNE])
def test_a_class_token_and_rotated_patches_joined_again_are_the_tokens(spec: str) -> None:
    right(check_of(Net(first_token, blocks=[RotaryBlock() for _ in range(3)]), (12, WIDTH)), spec)


class FlatBlock(ScaledBlock):
    """The MLP runs over all tokens of all samples as rows, as in OPT."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        shape = x.shape
        rows = x.reshape(-1, x.shape[-1])
        return (rows + self.mlp(self.norm2(rows))).view(shape)

    def block(self) -> Block:
        return replace(
            super().block(),
            join=lambda x, attended: x + self.attn.proj(attended),
            mlp=lambda x: x + self.mlp(self.norm2(x)),
        )


@pytest.mark.parametrize(("spec", "step"), [(MERGE, merge(2, 1)), (PRUNE, prune(0.6))])
def test_an_mlp_over_the_rows_of_all_samples(spec: str, step: Step) -> None:
    net, x = Net(first_token, blocks=[FlatBlock() for _ in range(3)]), torch.randn(3, TOKENS, WIDTH)
    sites = (0, 1, 2) if spec == MERGE else (0, 1)
    steps = dict.fromkeys(sites, step)
    want = net.oracle(x, steps, lambda net, tokens: net.head(tokens.x[:, 0]))
    check_of(net, (TOKENS, WIDTH)).run(spec).numbers(32, inputs=(x,), want=want)


def test_the_last_of_parallel_blocks_has_nothing_behind_it() -> None:
    """Attention and MLP are side by side: behind their sum is no MLP that fewer tokens help."""
    net = Net(lambda net, x: x, blocks=[ParallelBlock() for _ in range(3)])
    (axis,) = check_of(net, (12, WIDTH)).program.get(find_tokens)
    assert [site.block for site in axis.usable()] == [0, 1]
    refusal = axis.sites[-1].refusal
    assert refusal is not None
    assert refusal.reason == "nothing but outputs follows this attention call"


class Towers(nn.Module):
    """Two sequences of one length that read one table of places, and one attends to the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.text, self.image = (nn.ModuleList(ScaledBlock() for _ in range(3)) for _ in range(2))
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        places = self.table(torch.arange(TOKENS))
        x, y = x + places, y + places
        for one, other in zip(self.text, self.image, strict=True):
            x, y = one(x), other(y)
        met = (heads(f(z)) for f, z in ((self.query, x), (self.key, y), (self.value, y)))
        x = x + scaled_dot_product_attention(*met).transpose(1, 2).flatten(2)
        x = x + self.down(gelu(self.up(x)))
        return x[:, 0], y[:, 0]


@pytest.fixture(scope="module")
def towers() -> Check:
    return check_of(Towers(), (TOKENS, WIDTH), (TOKENS, WIDTH))


def test_sequences_that_share_a_table_stay_two(towers: Check) -> None:
    axes = towers.program.get(find_tokens)
    assert [axis.name for axis in axes] == ["text.tokens", "image.tokens"]
    assert axes[0].tokens.dim != axes[1].tokens.dim


def test_towers_that_meet_are_reduced_rightly(towers: Check) -> None:
    right(towers, MERGE)


@pytest.mark.parametrize("axis", ["text.tokens", "image.tokens"])
@pytest.mark.parametrize("spec", ["merge-tokens{r=2,axis=%s}", "prune-tokens{keep=0.6,axis=%s}"])
def test_the_axis_that_is_named_is_reduced(towers: Check, spec: str, axis: str) -> None:
    program, _ = apply(towers.program, spec % axis)
    lengths: dict[str, int] = {}
    for node in program.nodes():
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            query = node.args[0]
            assert isinstance(query, Node)
            lengths[module_path(node).split(".")[0]] = query.meta["val"].shape[2]
    named, other = axis.split(".")[0], {"text", "image"} - {axis.split(".")[0]}
    assert lengths[named] < TOKENS
    assert lengths[other.pop()] == TOKENS
