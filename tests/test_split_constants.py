"""split-constants: a table that two sequences read becomes one for each."""

import pytest
import torch
from torch import Tensor, nn

from effopt.axes import find_axes
from effopt.passes.recipes import NORMAL_FORM
from tests.check import Check
from tests.judged import TOKENS, WIDTH, Block, Model, judged, x


class Shared(nn.Module):
    """Two towers of one length under one table of positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.places = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.first, self.second = Block(), Block()

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(left + self.places), self.second(right + self.places)


def towers() -> Check:
    return Check(Shared().eval(), (x(), x().flip(1)))


def test_each_tower_has_a_table_of_its_own() -> None:
    done = towers().run(NORMAL_FORM)
    tables = [node for node in done.program.nodes() if node.target == "places"]
    assert len(tables) == 2
    assert all(len(table.users) == 1 for table in tables)
    axes = done.program.get(find_axes)
    assert axes.of(tables[0])[1] != axes.of(tables[1])[1]
    done.numbers(4).idempotent("split-constants")


def test_a_table_that_one_sequence_reads_often_stays_one() -> None:
    class Twice(Shared):
        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(left + self.places) + self.places
            return y, self.second(right)

    Check(Twice().eval(), (x(), x())).run("split-constants").kept("none")


@pytest.mark.parametrize("spec", ["prune-tokens{keep=0.5}", "prune-tokens{keep=0.9,fuse=true}"])
def test_a_shared_table_is_gathered_at_the_tokens_of_its_reader(spec: str) -> None:
    """With one token fused there are as many as before, in another order: no size would tell."""

    def run(net: Model, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        left = net.blocks[0](left + net.places)  # the first reader: the table is read as its own
        for block in net.blocks:
            right = block(right + net.places)
        return left, right[:, 0]

    assert judged(run, (x(), x().flip(1)), spec) == ""


def test_a_reader_that_reads_a_constant_twice_ends_the_search() -> None:
    class Differences(Shared):
        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            ids = torch.arange(TOKENS).repeat(left.shape[0], 1)
            breaks = torch.diff(ids, dim=1, prepend=ids[:, :1] - 1) != 1
            return self.first(left + ids.unsqueeze(2)), self.second(right + breaks.unsqueeze(2))

    Check(Differences().eval(), (x(), x())).run(NORMAL_FORM).numbers(4)
