"""Scale groups: which are found and why others are pinned, and that any scales of them are free."""

import json
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from effopt.program import Program, module_path
from effopt.scales import describe, find_scales
from effopt.verify import verify
from tests.programs import normal, reduced
from tests.scale_networks import HEADS, NETWORKS, WIDTH, WORDS, Scaled, groups, ids, program_of
from tests.scaling import by_place, new_inputs, powers, prove, rescaled


def kinds(program: Program) -> dict[str, int]:
    return dict(Counter(group.kind for group in groups(program)))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_groups_of_each_network_are_found_and_free(name: str) -> None:
    build, expected = NETWORKS[name]
    assert prove(program_of(build(), (ids(),))) == expected


def test_a_free_length_gives_the_same_groups() -> None:
    build, expected = NETWORKS["RMSNorm, GQA 4/2, SwiGLU"]
    program = program_of(build(), (ids(),), "batch", "length")
    assert prove(program) == expected


def test_grouped_heads_share_the_scales_of_their_values() -> None:
    program = program_of(NETWORKS["RMSNorm, GQA 4/2, SwiGLU"][0](), (ids(),))
    tied = next(group for group in groups(program) if group.kind == "tied")
    width = WIDTH // HEADS
    heads = torch.tensor(tied.roots).view(HEADS, width)
    first, second = torch.arange(width), torch.arange(width, 2 * width)
    assert torch.equal(heads, torch.stack([first, first, second, second]))
    assert [module_path(node) for node in tied.producers] == ["parts.0.inputs.2"]


class Tied(nn.Module):
    """The head reads the table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return functional.linear(self.norm(self.body(self.words(ids))), self.words.weight)


def test_a_weight_with_two_readers_is_pinned() -> None:
    program = program_of(Tied(), (ids(),))
    (group,) = groups(program)
    assert group.kind == "mul"
    assert module_path(group.linears[0]) == "body"
    # The table is read twice, so its columns are not free; the last layer is no candidate.
    assert program.get(find_scales).pinned[group.source] == "embedding (embedding.default) in words"
    prove(program)


class Twisted(nn.Module):
    """Two layers read the same channels in different orders: they cannot both choose."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.one, self.other = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.one(y) + self.other(y.flip(-1))


def test_layers_that_read_other_orders_get_a_multiplication_each() -> None:
    program = program_of(Twisted(), (torch.randn(2, 5, WIDTH),))
    assert kinds(program) == {"mul": 2}
    reason = "other layers read its channels in another order"
    assert set(program.get(find_scales).pinned.values()) == {reason}
    prove(program)


class Folding(nn.Module):
    """The batch is folded into the channels: what a channel is follows from a free size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        mixed = self.norm(x).reshape(4 * batch).reshape(4, batch)
        return self.body(mixed.t().contiguous())


def test_labels_that_follow_a_free_size_are_pinned() -> None:
    program = program_of(Folding(), (torch.randn(6, 4),))
    assert kinds(program) == {"mul": 1}
    after = rescaled(program, {0: torch.tensor([2.0, 0.5, 4.0, 0.25])})
    for batch in (2, 5, 9):
        x = torch.randn(batch, 4)
        assert torch.equal(after.run((x,))[0], program.run((x,))[0])


def test_a_gain_absorbs_scales() -> None:
    program = program_of(Scaled(), (torch.randn(2, 8),))
    first, second = groups(program)
    assert (first.kind, second.kind) == ("mul", "folded")
    assert [node.target for node in second.producers] == [torch.ops.aten.mul.Tensor]
    prove(program)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("vit", "merge-tokens{r=4}"),
        ("vit", "prune-tokens{keep=0.5}"),
        ("bert", "merge-tokens{r=3}"),
    ],
)
def test_scales_are_free_after_a_reduction(name: str, spec: str) -> None:
    program, _ = reduced(name, spec)
    scales = program.get(find_scales)
    # The classifier reads a token of the last norm through the kernels: nothing new is pinned.
    assert kinds(program) == kinds(normal(name))
    after = rescaled(program, by_place(scales, powers(scales)))
    verify(after, "test")
    inputs = new_inputs(program)
    # Powers of two round nothing, so not even a choice among equal tokens can turn out otherwise.
    for got, want in zip(after.run(inputs), program.run(inputs), strict=True):
        assert torch.equal(got, want)


def test_the_description_is_plain_data() -> None:
    program = normal("bert")
    rows = describe(program.get(find_scales))
    assert json.loads(json.dumps(rows)) == rows
    assert rows[1] == {
        "kind": "folded",
        "linears": ["bert.encoder.layer.0.attention.output.dense"],
        "source": "bert.encoder.layer.0.attention.self",
        "width": 32,
        "roots": 32,
        "producers": ["bert.encoder.layer.0.attention.self.value"],
        "pinned": "",
    }
    assert rows[3]["kind"] == "mul"
    assert rows[3]["pinned"].startswith("gelu (gelu.default) in ")
