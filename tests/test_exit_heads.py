"""Heads of exits: ridge regression against another's, how rows stream, the lens and the polish."""

from collections.abc import Sequence

import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.functional import softmax

from effopt.calibration import read_calibration
from effopt.errors import UsageError
from effopt.exits import find_exits
from effopt.passes.exit_fit import FIT, marks, returning
from effopt.passes.exit_heads import PENALTIES, Head, Moments, agreement, fitness, split_head
from effopt.passes.exit_polish import polish
from effopt.passes.exit_rows import Order, fit_rows, only, with_batches
from effopt.program import Program
from tests.check import Check
from tests.programs import apply


def draw(rows: int, features: int = 6, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of uneven means and deviations, and targets that depend on them, not linearly."""
    made = torch.Generator().manual_seed(seed)
    scale, shift = torch.logspace(-2, 2, features), torch.linspace(-30, 50, features)
    x = torch.randn(rows, features, generator=made)
    # one world for all seeds: what differs is the rows
    weight = torch.randn(features, classes, generator=torch.Generator().manual_seed(99))
    noise = 0.3 * torch.randn(rows, classes, generator=made)
    return x * scale + shift, 3 * (x @ weight).tanh() + noise + 7


def fitted(parts: Sequence[tuple[Tensor, Tensor]]) -> list[Head]:
    moments = Moments()
    for features, targets in parts:
        moments.update(features, targets)
    return list(moments.solve())


# --- ridge ------------------------------------------------------------------------------------


def test_ridge_is_that_of_another_implementation_on_standardised_features() -> None:
    features, targets = draw(200)
    table = StandardScaler().fit_transform(features.double().numpy())
    for head, lam in zip(fitted([(features, targets)]), PENALTIES, strict=True):
        model = Ridge(alpha=lam * len(table)).fit(table, targets.double().numpy())
        want = torch.from_numpy(model.predict(table))
        # measured 2.2e-12 for answers up to 15: means are up to 3000 deviations
        assert (head(features) - want).abs().max() < 1e-11
        assert head.lam == lam


def test_sums_are_in_double_precision_whatever_the_batches() -> None:
    features, targets = draw(300)
    whole = fitted([(features, targets)])
    for size in (1, 7, 64):
        cut = fitted(list(zip(features.split(size), targets.split(size), strict=True)))
        for one, two in zip(whole, cut, strict=True):
            # measured 2.8e-14 for weights up to 160, 1.4e-12 for biases up to 4500
            assert (one.weight - two.weight).abs().max() < 1e-12
            assert (one.bias - two.bias).abs().max() < 1e-11


def test_features_that_do_not_vary_get_no_weight() -> None:
    features, targets = draw(100)
    features[:, 2], features[:, 4] = 0.0, 1e4
    for head in fitted([(features, targets)]):
        assert head.weight.isfinite().all()
        assert not head.weight[:, [2, 4]].any()


def test_fewer_rows_than_features_have_a_solution() -> None:
    features, targets = draw(5, features=40)
    assert all(head.weight.isfinite().all() for head in fitted([(features, targets)]))


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(odd: float) -> None:
    features, targets = draw(10)
    features[3, 1] = odd
    with pytest.raises(UsageError, match="NaN or infinity"):
        Moments().update(features, targets)


def test_a_head_of_two_outputs_is_the_heads_of_each() -> None:
    features, targets = draw(100)
    both = [split_head(head, [1, 3]) for head in fitted([(features, targets)])]
    for place, part in enumerate(targets.split([1, 3], 1)):
        for heads, alone in zip(both, fitted([(features, part)]), strict=True):
            assert torch.allclose(heads[place].weight, alone.weight, rtol=0, atol=1e-12)


def test_heads_are_compared_by_agreement_then_by_error() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    assert agreement(logits, logits) == 1.0
    assert agreement(logits, logits.flip(1)) == 0.0
    same = Head(torch.eye(3).double(), torch.zeros(3).double(), 1.0)
    near = Head(0.5 * torch.eye(3).double(), torch.zeros(3).double(), 1.0)
    assert fitness(same, logits, logits, 3) > fitness(near, logits, logits, 3)
    assert fitness(near, logits, logits, 3)[0] == 1.0


# --- polish -----------------------------------------------------------------------------------


def loss(head: Head, rows: tuple[Tensor, Tensor]) -> float:
    """The cross entropy from the wanted probabilities, in numpy's own words."""
    features, wanted = (x.double() for x in rows)
    given = head(features)
    given = given - given.exp().sum(1, keepdim=True).log()
    return float(-(softmax(wanted, 1) * given).sum(1).mean())


@pytest.mark.parametrize("seed", range(4))
def test_polish_is_never_worse_on_held_out_rows(seed: int) -> None:
    rows, held = draw(120, seed=seed), draw(60, seed=seed + 50)
    for head in fitted([rows])[::2]:
        polished = polish(head, rows, held, 4, 50)
        assert polished is head or loss(polished, held) < loss(head, held)


def test_polish_lowers_what_it_descends() -> None:
    rows = draw(200)
    worst = Head(torch.zeros(4, 6).double(), torch.zeros(4).double(), 1.0)
    polished = polish(worst, rows, rows, 4, 300)
    assert loss(polished, rows) < loss(worst, rows) - 0.1  # measured 1.39 ahead, 0.99 behind
    again = polish(worst, rows, rows, 4, 300)
    assert torch.equal(polished.weight, again.weight), "nothing is drawn"


# --- rows -------------------------------------------------------------------------------------


def test_rows_that_fit_are_drawn_once_and_for_all() -> None:
    chosen = fit_rows(1000, 0.4)
    assert chosen.dtype == torch.bool
    assert chosen.sum() == 400
    assert torch.equal(chosen, fit_rows(1000, 0.4))
    assert not torch.equal(chosen, fit_rows(1000, 0.4, seed=1))
    assert fit_rows(7, 0.29).sum() == 2, "the nearest whole number"
    halves = [int(half.sum()) for half in chosen.split(500)]
    assert all(150 < half < 250 for half in halves), "from everywhere in the data"


def program_of(net: nn.Module, *inputs: Tensor, dynamic: tuple[str, ...] = ("batch",)) -> Program:
    return Check(net, inputs, dynamic).normal().program


class Affine(nn.Module):
    """Attention and a linear layer; attention of the second block adds nothing."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.qk = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))
        self.silent = nn.Linear(4, 4)
        nn.init.zeros_(self.silent.weight)
        nn.init.zeros_(self.silent.bias)

    def forward(self, x: Tensor) -> Tensor:
        for place, (qk, up) in enumerate(zip(self.qk, self.up, strict=True)):
            h = qk(x).unsqueeze(1)
            seen = nn.functional.scaled_dot_product_attention(h, h, h).squeeze(1)
            x = x + (self.silent(seen) if place else seen)
            x = x + up(x)
        return nn.functional.layer_norm(x, [4]).relu()


class Mean(Affine):
    """The mean over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


def batches(rows: int, of: int, tokens: int = 5, seed: int = 0) -> list[Tensor]:
    draw_ = torch.Generator().manual_seed(seed)
    return list(torch.randn(rows, tokens, 4, generator=draw_).split(of))


def with_data(program: Program, data: list[Tensor]) -> Program:
    program.calibration = read_calibration(data, program)
    return program


def test_batches_come_with_the_numbers_of_their_samples() -> None:
    program = program_of(Affine(), torch.randn(2, 5, 4))
    data = with_data(program, batches(20, 6)).calibration
    assert data is not None
    pairs = list(with_batches(data, Order()))
    assert [len(numbers) for _, numbers in pairs] == [6, 6, 6, 2]
    assert torch.equal(torch.cat([numbers for _, numbers in pairs]), torch.arange(20))
    given, numbers = pairs[1]
    (batch,), left = only(program, given, numbers % 3 != 0)
    assert left.tolist() == [1, 2, 4, 5]
    assert torch.equal(batch, given[0][left])


def test_a_batch_of_fixed_size_stays_whole() -> None:
    program = program_of(Affine(), torch.randn(3, 5, 4), dynamic=())
    (batch,), left = only(program, (torch.randn(3, 5, 4),), torch.tensor([False, True, False]))
    assert batch.shape == (3, 5, 4)
    assert left.tolist() == [0, 1, 2]


# --- heads in a graph -------------------------------------------------------------------------


def answers(program: Program, x: Tensor) -> list[Tensor]:
    """What each exit says, and the end."""
    exits = program.get(find_exits)
    assert exits is not None
    nodes = [next(iter(one.answers.values())) for one in exits.exits]
    return list(returning(program, [*nodes, next(iter(exits.ends.values()))]).run((x,)))


def exits_of(net: nn.Module, spec: str, of: int = 10) -> Program:
    torch.manual_seed(0)
    program = with_data(program_of(net, torch.randn(2, 5, 4)), batches(300, of))
    return apply(program, f"exit-early{{{spec}}}")[0]


def test_a_lens_finds_the_map_that_follows_and_reads_it_by_the_models_own_tail() -> None:
    torch.manual_seed(1)
    net = Affine()
    program = exits_of(net, "cuts=[0,1],epsilon=0.05,head=lens")
    first, second, end = answers(program, torch.randn(6, 5, 4))
    assert first.shape == end.shape
    # measured 6e-4 of values up to 1.7: the least penalty shrinks a map by 1e-4 of itself
    assert (first - end).abs().max() < 2e-3
    assert (second - end).abs().max() < 2e-3


def test_heads_do_not_depend_on_how_samples_are_cut_into_batches() -> None:
    torch.manual_seed(1)
    net, x = Mean(), torch.randn(6, 5, 4)
    one, other = (answers(exits_of(net, "epsilon=0.05", of), x) for of in (10, 37))
    for a, b in zip(one, other, strict=True):
        # the program may round other batches otherwise; measured 0 for values up to 1.0
        assert (a - b).abs().max() < 4e-6


def test_a_ridge_head_in_the_graph_is_that_of_another_implementation() -> None:
    """From what the program gives on the rows that fit, without those that choose the penalty."""

    torch.manual_seed(1)
    net = Mean()
    program = exits_of(net, "cuts=1,epsilon=0.05,pool=first-mean")
    exits = program.get(find_exits)
    assert exits is not None
    (answer,) = exits.exits[0].answers.values()
    node = answer.all_input_nodes[0]
    data = torch.cat(batches(300, 300))
    features, given, end = returning(program, [node, answer, exits.ends["output"]]).run((data,))
    rows = marks(300, 0.4) == FIT
    scaler = StandardScaler().fit(features[rows].double().numpy())
    table = scaler.transform(features.double().numpy())
    errors = []
    for lam in PENALTIES:
        model = Ridge(alpha=lam * int(rows.sum()))
        model.fit(table[rows.numpy()], end[rows].double().numpy())
        errors.append(float((torch.from_numpy(model.predict(table)) - given).abs().max()))
    # one of the penalties was chosen; measured 1.8e-7 for it, which is float32, and 0.02 for others
    assert min(errors) < 2e-6
    assert sorted(errors)[1] > 1e-3
