"""Token axes and sites: what is found in each zoo model and in encoders spelled otherwise."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from effopt.masks import find_padding
from effopt.program import is_tensor, module_path
from effopt.sites import TokenAxis, find_tokens
from effopt.tokens import Kind
from tests import spellings
from tests.check import Check
from tests.programs import normal
from tests.spellings import Net, ScaledBlock


@dataclass(frozen=True)
class Found:
    """What the analysis should find: tokens, protected ends, picks, padding."""

    size: int
    prefix: int = 0
    suffix: int = 0
    picks: tuple[int, ...] = ()
    padding: bool = False


ZOO = {
    "vit": Found(17, 1, 0, (0,)),
    "deit": Found(18, 2, 0, (0, 1)),
    "dinov2": Found(17, 1, 0, (0,)),
    "clip_vision": Found(17, 1, 0, (0,)),
    "bert": Found(16, 1, 0, (0,), padding=True),
    "bert_tokens": Found(16, padding=True),
    "roberta": Found(16, 1, 0, (0,), padding=True),
    "encoder": Found(12),
    "encoder_padded": Found(12, padding=True),
}


def described(axis: TokenAxis) -> Found:
    assert isinstance(axis.size, int)
    padding = find_padding(axis)
    assert padding.refusal is None
    return Found(axis.size, axis.prefix, axis.suffix, axis.picks, padding.mask is not None)


@pytest.mark.parametrize("name", ZOO)
def test_one_axis_with_a_site_in_every_block(name: str) -> None:
    (axis,) = normal(name).get(find_tokens)
    assert axis.name == "tokens"
    assert described(axis) == ZOO[name]
    assert [site.block for site in axis.sites] == [0, 1, 2]
    assert axis.usable() == axis.sites
    for site in axis.sites:
        assert site.places == (0, 1, 2)
        assert site.node in normal(name).nodes()


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_site_is_what_the_mlp_and_its_residual_read(name: str) -> None:
    (axis,) = normal(name).get(find_tokens)
    for site in axis.sites:
        assert "add" in site.join.name
        paths = [module_path(user) for user in site.node.users]
        assert len(paths) == 2
        norm = "layernorm_after" if name == "vit" else "intermediate"
        assert any(norm in path for path in paths)
        if name == "bert":
            assert "layer_norm" in site.node.name, "post-norm: the norm's result is the site"
        else:
            assert site.node is site.join


def find(net: nn.Module, *shape: int) -> TokenAxis:
    (axis,) = Check(net, torch.randn(2, *shape)).normal().program.get(find_tokens)
    return axis


@pytest.mark.parametrize(
    ("read", "want"),
    [
        (lambda net, x: x[:, 0], Found(12, 1, 0, (0,))),
        (lambda net, x: x.select(1, 2), Found(12, 3, 0, (2,))),
        (lambda net, x: x[:, -1], Found(12, 0, 1, (-1,))),
        (lambda net, x: x[:, 0] + x[:, -2], Found(12, 1, 2, (-2, 0))),
        (lambda net, x: x[:, 3:].mean(1), Found(12, 3)),
        (lambda net, x: x[:, :-2].mean(1), Found(12, 0, 2)),
        (lambda net, x: x[:, 1:][:, 0], Found(12, 2, 0, (1,))),
        (lambda net, x: x[:, 1:, :4].mean(1) + x[:, 0, :4], Found(12, 1, 0, (0,))),
        (lambda net, x: x.unbind(1)[0], Found(12, 1, 0, (0,))),
        (lambda net, x: net.head(x.transpose(0, 1)[0]), Found(12, 1, 0, (0,))),
        (lambda net, x: x.split((1, 11), 1)[0][:, 0], Found(12, 1, 0, (0,))),
    ],
)
def test_what_outputs_pick_is_protected(read: spellings.Read, want: Found) -> None:
    assert described(find(Net(read), 12, 16)) == want


@pytest.mark.parametrize(
    ("first", "want"),
    [
        (spellings.grid, Found(12)),
        (spellings.with_registers, Found(15, 3)),
        (spellings.with_detection, Found(15, 1, 2)),
    ],
)
def test_learned_tokens_are_protected(first: spellings.Read, want: Found) -> None:
    assert described(find(Net(spellings.mean, first), 3, 16, 12)) == want


def test_learned_tokens_between_those_of_the_sample_are_refused() -> None:
    def between(net: Net, x: Tensor) -> Tensor:
        x = spellings.grid(net, x)
        return torch.cat([x[:, :6], net.cls.expand(x.shape[0], -1, -1), x[:, 6:]], 1)

    axis = find(Net(spellings.mean, between), 3, 16, 12)
    assert {site.refusal.reason for site in axis.sites if site.refusal} == {
        "learned tokens stand between those of the sample"
    }


def test_a_block_before_a_change_of_order_has_no_site() -> None:
    class Shuffled(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x).cumsum(1)
            return self.read(self, self.blocks[2](self.blocks[1](x)))

    axis = find(Shuffled(spellings.mean), 12, 16)
    assert [site.block for site in axis.usable()] == [1, 2]
    refusal = axis.sites[0].refusal
    assert refusal is not None
    assert refusal.reason == "it depends on the order of the tokens"


def test_two_sequences_are_two_axes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = ScaledBlock(), ScaledBlock()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.left(x).mean(1) + self.right(y).mean(1)

    check = Check(Two(), (torch.randn(2, 12, 16), torch.randn(2, 12, 16))).normal()
    left, right = check.program.get(find_tokens)
    assert (left.name, right.name) == ("left.tokens", "right.tokens")
    assert left.tokens.dim != right.tokens.dim


def test_tokens_heads_and_channels_of_one_size() -> None:
    """Twelve heads of one channel over twelve tokens of a batch of twelve: all told apart."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk, self.up = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            h = self.qk(x).unflatten(2, (12, 1)).transpose(1, 2)
            x = x + scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(2)
            return x + self.up(x)

    check = Check(Square(), torch.randn(12, 12, 12)).normal()
    (axis,) = check.program.get(find_tokens)
    (site,) = axis.sites
    assert site.refusal is None
    assert site.places == (0, 1, 2)
    check.run("merge-tokens{r=4}")
    assert check.program.run((torch.randn(3, 12, 12),))[0].shape == (3, 12, 12)


def test_effects_along_the_tokens_of_a_mean_pooled_encoder() -> None:
    axis = find(Net(lambda net, x: net.head(x[:, 0] + x.mean(1))), 12, 16)
    kinds = [found.kind for node, found in axis.effects.items() if is_tensor(node)]
    assert kinds.count(Kind.ATTEND) == 3
    assert kinds.count(Kind.POOL) == 1
    assert kinds.count(Kind.PICK) == 1
    assert Kind.ORDER not in kinds
    assert Kind.EMIT not in kinds


def test_dynamic_length_is_an_axis_of_symbolic_size() -> None:
    (axis,) = normal("bert", "batch", "length").get(find_tokens)
    assert not isinstance(axis.size, int)
    assert (axis.prefix, axis.suffix, axis.picks) == (1, 0, (0,))
    assert len(axis.usable()) == 3
