"""Fitting the heads of exits: calibration data goes through the program once, as a stream."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import one_hot

from effopt.calibration import Calibration
from effopt.collectors import Rows
from effopt.edit import Edit
from effopt.errors import PreconditionError, at
from effopt.passes.exit_heads import Head, Moments, agreement, fitness, split_head
from effopt.passes.exit_plan import Plan
from effopt.passes.exit_polish import SURE, polish
from effopt.passes.exit_rows import Order, fit_rows, only, with_batches
from effopt.program import Program, shape, where
from effopt.signature import Signature, TensorSpec
from effopt.spool import Spool
from effopt.statistics import Real, find_real

KEPT = 4096
"""Rows that are kept to choose the penalty by, and to polish on, at most."""
HELD = 0.1
"""The part of the fitting samples that chooses, and does not fit."""
PER_FEATURE = 50
"""Tokens that fit a lens, for each of its features: more of them say nothing new."""
FIT, _CHOOSE = 1, 2

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Fit:
    """The heads of the exits, one an output, or one for a lens; `rows` that fitted each exit's.

    `held` are batches with samples that fitted nothing, and which of theirs did so: bool [b].
    `order` is the hash of all samples as they came.
    """

    heads: tuple[tuple[Head, ...], ...]
    rows: tuple[int, ...]
    held: Spool
    order: str


@dataclass
class _Sums:
    """What is kept of the rows of one head: `choose` and `learn` are [features, targets]."""

    moments: Moments = field(default_factory=Moments)
    choose: Rows = field(default_factory=lambda: Rows(KEPT))
    learn: Rows | None = None

    def take(self, features: Tensor, targets: Tensor, held: bool) -> None:
        """Take rows [n, F] and [n, C]."""
        if not held:
            self.moments.update(features, targets)
        keeper = self.choose if held else self.learn
        if keeper is not None and len(features):
            keeper.update(torch.cat([features, targets.to(features.dtype)], 1))


def marks(count: int, share: float) -> Tensor:
    """Mark samples: 0 calibrates, 1 fits, 2 chooses among what was fitted; int64 [count]."""
    fits = fit_rows(count, share)
    found = fits.long()
    found[fits.nonzero().reshape(-1)[fit_rows(int(fits.sum()), HELD, seed=1)]] = _CHOOSE
    return found


def returning(program: Program, nodes: Sequence[Node]) -> Program:
    """Return a fork that returns the values of nodes, and computes no more."""
    fork = program.fork()
    named = {node.name: node for node in fork.nodes()}
    specs = tuple(TensorSpec(node.name, "", (), node.name) for node in nodes)
    tree = {"tuple": list(range(len(nodes)))}
    edit = Edit(fork, "exit-early")
    wanted = [named[node.name] for node in nodes]
    edit.outputs(wanted, Signature(fork.signature.inputs, specs, tree))
    edit.close()
    return fork


def fit_heads(
    program: Program,
    plan: Plan,
    features: Sequence[Node],
    share: float,
    shared: bool,
    steps: int,
    labels: Tensor | None = None,
) -> Fit:
    """Fit heads from the `features` of each exit to what the whole program gives.

    `share` of the samples is taken, a tenth of it to choose penalties by. `steps` of polish. With
    `labels` [samples], heads of the output that is scored are fitted to those, 1 for the class and
    0 for others. Raises PreconditionError where too few tokens reach a lens, or values are no
    numbers.
    """
    data = program.calibration
    assert data is not None, "checked"
    learn = [Rows(KEPT) if steps else None for _ in features]
    own = [_Sums(learn=rows) for rows in learn]
    sums = [own[0]] * len(own) if shared else own
    stream = _Stream(program, plan, features, data, labels)
    held = Spool(stream.feed(sums, marks(data.samples, share)))
    held.fill()
    sure = {} if labels is None else {plan.scored: SURE}
    known = {id(one): _heads(plan, one, steps, sure) for one in sums}
    rows = tuple(one.moments.rows for one in sums)
    heads = tuple(known[id(one)] for one in sums)
    return Fit(heads, rows, held, stream.order.digest())


class _Stream:
    """Runs batches and hands each exit's rows to its sums."""

    def __init__(
        self,
        program: Program,
        plan: Plan,
        features: Sequence[Node],
        data: Calibration,
        labels: Tensor | None,
    ) -> None:
        self.program, self.plan, self.data = program, plan, data
        self.nodes, self.labels = features, labels
        real = find_real(program, plan.last.node) if plan.reads.is_lens else ""
        self.real = real.mask if isinstance(real, Real) else None
        targets = [plan.last.node] if plan.reads.is_lens else list(plan.answers.values())
        masks = [self.real] if self.real is not None else []
        self.fork = returning(program, [*features, *targets, *masks])
        self.lots = torch.Generator().manual_seed(0)
        self.order = Order()

    def feed(self, sums: Sequence[_Sums], chosen: Tensor) -> Iterator[tuple[Inputs, Tensor]]:
        """Feed all batches; yield the inputs of samples that are held out, and which these are."""
        for batch, numbers in with_batches(self.data, self.order):
            if chosen[numbers].any():
                inputs, left = only(self.program, batch, chosen[numbers] != 0)
                numbers = numbers[left]
                values, own = self.fork.run(inputs), chosen[numbers]
                self._take(sums, values, numbers, own == FIT, held=False)
                self._take(sums, values, numbers, own == _CHOOSE, held=True)
                if (own == _CHOOSE).any():
                    inputs, left = only(self.program, inputs, own == _CHOOSE)
                    yield inputs, own[left] == _CHOOSE

    def _take(
        self,
        sums: Sequence[_Sums],
        values: Sequence[Tensor],
        numbers: Tensor,
        rows: Tensor,
        held: bool,
    ) -> None:
        count, kept = len(self.nodes), self._tokens(values, rows)
        targets = self._targets(values[count:], numbers)[kept]
        lot = self._lot(len(targets))
        for node, one, found in zip(self.nodes, sums, values[:count], strict=True):
            with at(where(node)):
                one.take(self._first(found)[kept][lot], targets[lot], held)

    def _first(self, found: Tensor) -> Tensor:
        """Return a value with its samples first."""
        return found.movedim(self.plan.last.samples, 0) if self.plan.reads.is_lens else found

    def _targets(self, values: Sequence[Tensor], numbers: Tensor) -> Tensor:
        if self.plan.reads.is_lens:
            return self._first(values[0])
        outputs = dict(zip(self.plan.answers, values, strict=False))
        if self.labels is not None:
            scored = outputs[self.plan.scored]
            classes = one_hot(self.labels[numbers], scored.shape[1])
            outputs[self.plan.scored] = classes.to(scored)
        return torch.cat([found.reshape(len(found), -1) for found in outputs.values()], 1)

    def _tokens(self, values: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Return which samples are taken, or of a lens which of their tokens: no padding."""
        if not self.plan.reads.is_lens:
            return rows
        found = self._first(values[0])
        kept = rows.reshape(-1, *[1] * (found.ndim - 2)).expand(found.shape[:-1])
        if self.real is None:
            return kept
        mask = values[-1]
        return kept & (mask != 0).reshape(mask.shape[0], mask.shape[-1])

    def _lot(self, count: int) -> Tensor:
        """Draw the rows of a batch that are enough for a lens; all are, of samples."""
        most = count
        if self.plan.reads.is_lens:
            most = min(count, ceil(PER_FEATURE * self.plan.last.channels / self.data.batches))
        return torch.randperm(count, generator=self.lots)[:most].sort().values


def _heads(plan: Plan, sums: _Sums, steps: int, sure: Mapping[str, float]) -> tuple[Head, ...]:
    """Choose the best head for each output by the rows that are held out.

    Targets that are no logits are multiplied by what `sure` has for an output, to be polished to.
    """
    ends = {"": plan.last.node} if plan.reads.is_lens else plan.answers
    count = plan.reads.features(plan.streams[0])
    if sums.moments.rows < count or sums.choose.kept is None:
        reason = f"{sums.moments.rows} rows that are no padding fit a head of {count} features"
        raise PreconditionError(where(plan.last.node), reason, "give more calibration samples")
    widths = [count] if plan.reads.is_lens else [prod(shape(end)[1:]) for end in ends.values()]
    tried = [split_head(head, widths) for head in sums.moments.solve()]
    held = _tables(sums.choose, widths)
    rows = _tables(sums.learn, widths)
    found = list[Head]()
    for place, (name, end) in enumerate(ends.items()):
        classes = 1 if plan.reads.is_lens or len(shape(end)) < 2 else int(shape(end)[-1])
        own = [heads[place] for heads in tried]
        best = max(own, key=lambda one: fitness(one, *held[place], classes))
        if rows:
            learn, judge = (
                (features, wanted * sure.get(name, 1.0))
                for features, wanted in (rows[place], held[place])
            )
            best = polish(best, learn, judge, classes, steps)
        found.append(best)
    return tuple(found)


def _tables(rows: Rows | None, widths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Take kept rows apart: the features [n, F] with the targets [n, C] of each output."""
    if rows is None or rows.kept is None:
        return []
    total = rows.kept.shape[1] - sum(widths)
    features, targets = rows.kept.split_with_sizes([total, sum(widths)], 1)
    return [(features, target) for target in targets.split_with_sizes(list(widths), 1)]


def agreements(
    program: Program, plan: Plan, fit: Fit, answers: Sequence[Node]
) -> list[float | None]:
    """Return on what part of the held-out samples each answer's largest score is the model's.

    `answers` are the scored output of each exit; None where that is no scores of classes.
    """
    end = plan.answers[plan.scored]
    if len(shape(end)) < 2 or shape(end)[-1] == 1:
        return [None for _ in answers]
    fork, found, rows = returning(program, [*answers, end]), [0.0] * len(answers), 0
    for inputs, own in cast("Iterable[tuple[Inputs, Tensor]]", fit.held):
        *given, wanted = (_counted(plan, value)[own] for value in fork.run(inputs))
        found = [
            total + agreement(one, wanted) * len(wanted)
            for total, one in zip(found, given, strict=True)
        ]
        rows += len(wanted)
    return [total / rows for total in found]


def _counted(plan: Plan, answer: Tensor) -> Tensor:
    """Return what is scored of an answer: the last token of a causal model's, else all of it."""
    return answer if plan.position is None else answer.select(plan.position, -1)
