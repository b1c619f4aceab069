"""Cuts: where one value carries everything, in spellings of blocks and around skip connections."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from effopt.cost import macs, macs_by_node
from effopt.cuts import Cut, find_cuts
from effopt.program import Program, module_path
from tests import exited
from tests.check import Check
from tests.programs import captured, normal
from tests.spellings import WIDTH, ParallelBlock, ScaledBlock

TOKENS = 12


class Wired(nn.Module):
    """Three blocks, wired by a function of them and x."""

    def __init__(self, wire: Callable[..., object], block: type[nn.Module] = ScaledBlock) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.wire = wire

    def forward(self, x: Tensor) -> object:
        return self.wire(self, self.first(x))


class PostNorm(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(WIDTH, 2, 24, dropout=0.0, batch_first=True)


def straight(net: Wired, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x)
    return net.head(x.mean(1))


def program_of(net: nn.Module) -> Program:
    torch.manual_seed(0)
    return Check(net, torch.randn(2, TOKENS, WIDTH)).normal().program


def cuts_of(wire: Callable[..., object], block: type[nn.Module] = ScaledBlock) -> tuple[Cut, ...]:
    return find_cuts(program_of(Wired(wire, block)))


def blocks(cuts: Sequence[Cut]) -> list[int]:
    return [cut.block for cut in cuts]


def places(cuts: Sequence[Cut]) -> list[tuple[str, str]]:
    return [(module_path(cut.node), str(cut.node.target)) for cut in cuts]


@pytest.mark.parametrize(
    ("name", "path", "operator"),
    [
        ("vit", "vit.layers.{}", "aten.add.Tensor"),
        ("deit", "deit.layers.{}", "aten.add.Tensor"),
        ("dinov2", "dinov2.encoder.layer.{}", "aten.add.Tensor"),
        ("bert", "bert.encoder.layer.{}.output.LayerNorm", "aten.layer_norm.default"),
        ("roberta", "roberta.encoder.layer.{}.output.LayerNorm", "aten.layer_norm.default"),
    ],
)
def test_one_cut_behind_the_mlp_of_each_block(name: str, path: str, operator: str) -> None:
    cuts = find_cuts(normal(name))
    assert blocks(cuts) == [0, 1, 2]
    assert places(cuts) == [(path.format(n), operator) for n in range(3)]


def test_post_norm_cuts_are_what_the_next_block_adds_to() -> None:
    cuts = cuts_of(straight, PostNorm)
    assert places(cuts) == [(f"blocks.{n}.norm2", "aten.layer_norm.default") for n in range(3)]


def test_a_norm_behind_the_last_block_alone_is_no_part_of_it() -> None:
    def normed(net: Wired, x: Tensor) -> Tensor:
        for block in net.blocks:
            x = block(x)
        return net.head(nn.functional.layer_norm(x, (WIDTH,)).mean(1))

    assert {operator for _, operator in places(cuts_of(normed))} == {"aten.add.Tensor"}


def test_parallel_blocks_have_one_sum_each() -> None:
    assert places(cuts_of(straight, ParallelBlock)) == [
        (f"blocks.{n}", "aten.add.Tensor") for n in range(3)
    ]


def test_blocks_that_add_to_an_input_itself() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(ParallelBlock(), ParallelBlock())

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x).mean(1)

    assert blocks(find_cuts(program_of(Bare()))) == [0, 1]


def test_a_stream_that_is_flattened_around_the_mlp_has_cuts_where_it_is_laid_out_again() -> None:
    """As in OPT: the second sum of a block is [B * N, C], and a view of it is the stream."""

    class Flat(ScaledBlock):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = x + self.attn(self.norm1(x), mask)
            flat = x.reshape(-1, WIDTH)
            return (flat + self.mlp(self.norm2(flat))).view(x.shape)

    assert places(cuts_of(straight, Flat)) == [
        (f"blocks.{n}", "aten.reshape.default") for n in range(3)
    ]


@pytest.mark.parametrize("name", ["vit", "bert", "dinov2"])
def test_exits_hang_on_the_stream_and_change_no_cut(name: str) -> None:
    """Their answers are chosen among at the end: only the model's own way there counts."""
    program = exited.of_zoo(name)
    assert places(find_cuts(program)) == places(find_cuts(normal(name)))
    assert len(find_cuts(program)) == 3


def test_no_cut_under_a_long_skip() -> None:
    def u_net(net: Wired, x: Tensor) -> Tensor:
        a, b, c = net.blocks
        first = a(x)
        return net.head((c(b(first)) + first).mean(1))

    assert blocks(cuts_of(u_net)) == [0, 2]
    assert module_path(cuts_of(u_net)[-1].node) == ""  # the skip's own sum, not that of block 2


def test_no_cut_where_an_output_leaves_early() -> None:
    def early(net: Wired, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = net.blocks
        first = a(x)
        return net.head(first.mean(1)), net.head(c(b(first)).mean(1))

    assert blocks(cuts_of(early)) == [0]


def test_no_cut_in_towers_that_meet_at_the_end() -> None:
    def towers(net: Wired, x: Tensor) -> Tensor:
        a, b, c = net.blocks
        return net.head(b(a(x)).mean(1) * c(x.flip(1)).mean(1))

    assert cuts_of(towers) == ()


def test_no_attention_has_no_blocks() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 5))
    assert find_cuts(program_of(net)) == ()


def test_masks_and_position_biases_are_at_hand_everywhere() -> None:
    """One bias [H, N, N] of weights plus a mask of the inputs is read in every block."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(ScaledBlock() for _ in range(2))
            self.first, self.table = nn.Linear(WIDTH, WIDTH), nn.Embedding(2 * TOKENS, 2)

        def forward(self, x: Tensor, real: Tensor) -> Tensor:
            spots = torch.arange(x.shape[1])
            table = self.table(spots[None] - spots[:, None] + TOKENS).permute(2, 0, 1)[None]
            mask = table + (1.0 - real[:, None, None, :].float()) * -1e9
            x = self.first(x)
            for block in self.blocks:
                x = block(x, mask)
            return x.mean(1)

    inputs = (torch.randn(2, TOKENS, WIDTH), torch.ones(2, TOKENS))
    program = Check(Biased(), inputs).normal().program
    assert blocks(find_cuts(program)) == [0, 1]


def test_the_share_is_the_work_that_a_shortened_model_does() -> None:
    def depth(count: int) -> Program:
        def wire(net: Wired, x: Tensor) -> Tensor:
            for block in net.blocks[:count]:
                x = block(x)
            return x

        return program_of(Wired(wire))

    program = program_of(Wired(straight))
    for cut in find_cuts(program):
        assert cut.share == macs(depth(cut.block + 1)) / macs(program)


def test_the_work_of_the_nodes_adds_up() -> None:
    program = captured("bert")
    costs = macs_by_node(program)
    assert sum(costs.values()) == macs(program) > 0
    assert list(costs) == list(program.nodes())
