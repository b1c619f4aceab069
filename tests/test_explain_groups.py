"""`effopt.explain`: the layers that share scales, of every kind, and how the text tells them."""

import functools

import torch
from torch import Tensor, nn

import effopt
from effopt.explanation import Explanation
from tests.explained import explained
from tests.spellings import WIDTH


def test_groups_are_the_layers_that_share_scales() -> None:
    group = explained("vit").groups[0]
    norm = "vit.layers.0.layernorm_before"
    assert (group.family, group.source.path) == ("norm", norm)
    assert group.linears == tuple(f"vit.layers.0.attention.{x}_proj" for x in "qkv")
    assert (group.kind, group.producers, group.pinned) == ("folded", (norm,), "")
    assert (group.channels, group.scales) == (32, 32)
    behind = next(row for row in explained("vit").groups if row.kind == "mul")
    assert behind.linears == ("vit.layers.0.mlp.fc2",)
    assert (behind.producers, behind.pinned.split()[0]) == ((), "gelu")
    read = [linear for row in explained("vit").groups for linear in row.linears]
    assert len(read) == 3 * 6 + 1


class Grouped(nn.Module):
    """Two query heads share a head of values, and the last layer's weight is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.o, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)
        k, v = self.kv(x).unsqueeze(1).chunk(2, -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        y = self.o(y.transpose(1, 2).flatten(2))
        return self.last(self.last(y).tanh())


@functools.cache
def of_grouped() -> Explanation:
    return effopt.explain(Grouped().eval(), torch.randn(2, 12, WIDTH))


def test_groups_of_every_kind() -> None:
    groups = {row.linears: row for row in of_grouped().groups}
    assert {row.kind for row in groups.values()} == {"mul", "tied", "none"}
    tied = groups["o",]
    assert (tied.kind, tied.producers) == ("tied", ("kv",))
    assert (tied.channels, tied.scales) == (WIDTH, WIDTH // 2)
    assert groups["q", "kv"].pinned == "it is an input"
    assert [row.linears for row in of_grouped().groups if row.kind == "none"] == [("last",)] * 2


def test_the_text_says_who_takes_the_scales_up() -> None:
    text = of_grouped().text()
    for words in (
        "in all         1 by a multiplication, 1 folded and tied, 2 without scales",
        "by a multiplication: it is an input",
        "8 scales for 16 channels, folded into kv",
        "without scales: a weight is computed, or read elsewhere too",
    ):
        assert words in text


def test_groups_of_blocks_alike_are_one_row() -> None:
    text = explained("vit").text()
    assert "3 x            vit.layers.*.attention.{q_proj, k_proj, v_proj}" in text
    assert "vit.layers.0.mlp.activation_fn, and 2 more alike" in " ".join(text.split())
    assert "layers.1" not in text
