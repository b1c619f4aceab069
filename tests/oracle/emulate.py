"""Emulation: what a reduced program must yield, found by the ORIGINAL graph at its full length.

After merging, every member of a group holds a copy of the group's average: the model then runs
as it was written, since softmax over copies is what the log of a size stands for, and a mean over
copies is a weighted one. After pruning, dropped tokens stay in place, but no attention call sees
them as keys and no pooling counts them. So nothing that `effopt.mend` does is used here.

One sample at a time: then a choice of tokens is one list, and shared values have it too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from effopt.attention import SDPA
from effopt.program import is_tensor
from effopt.tokens import Range
from tests.oracle.case import Case
from tests.oracle.decisions import (
    GATHER,
    MATCH,
    SCATTER,
    SELECT,
    THROUGH,
    Step,
    base,
    chosen,
)
from tests.oracle.interpreter import Inputs, Recorder

aten = torch.ops.aten
POOLS = (
    *(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default),
    *(aten.max.dim, aten.any.dim, aten.all.dim, aten.logsumexp.default),
)


class NotEmulated(Exception):
    """The emulation has no meaning for this program; the reason says why."""


class ForcedError(Exception):
    """A real token had to merge into padding, with which no bias of token pairs can be right."""


@dataclass
class Epoch:
    """The tokens after some steps, at full length.

    `moved` [N]: which of the K tokens each stands in (-1: dropped); `places` [K]: where those
    stand; `keys` and `pool` [N]: what attention and pooling count.
    """

    moved: Tensor
    places: Tensor
    keys: Tensor
    pool: Tensor


class Emulator(Interpreter):
    """Runs the normal form of one sample at full length, with the choices of a reduced program."""

    def __init__(
        self, case: Case, run: Recorder, steps: list[Step], row: int, valid: Tensor | None
    ) -> None:
        super().__init__(case.normal.module, garbage_collect_values=False)
        self.case, self.steps, self.row = case, steps, row
        self.on = case.axis.tokens.on
        self.run_of_reduced = run
        self.batch = len(run.values[case.reduced.inputs()[0].name])
        self.twins = {node.name: node for node in case.reduced.nodes()}
        self.sites = {site.node.name: site for site in case.axis.sites}
        self.at_site = {step.site: place for place, step in enumerate(steps, start=1)}
        self.valid = valid
        self.epochs = _epochs(steps, valid, _proportional(case))
        self.epoch: dict[Node, int] = {}
        self.frozen: list[Tensor] = []
        self.apart: dict[Node, Any] = {}
        """What values are if each operand is read at the epoch it stands at."""
        self.again: set[Node] = set()
        """What the reduced program computes again, on all tokens, for the node that runs now."""
        self.thawed = _thawed(case)
        self.feeding = _feeding(case)
        self.positions = False
        """Whether a value that counts tokens was read behind a site, but made ahead of it."""

    def run_node(self, n: Node) -> Any:
        epoch = self._reads_at(n)
        self._now = n, epoch
        value = super().run_node(n)
        if n.target in (MATCH, SELECT):
            value = self._chosen_before(n, value)
        self._run_apart(n, epoch)
        if n.op != "output":
            self.epoch[n] = self._yields_at(n, value, epoch)
        if n.name in self.at_site:
            value = self._reduce(n, value)
            self.apart.pop(n, None)
        if n.name in self.thawed and self.epoch[n]:
            value = self._thaw(n, value, self.epoch[n])
            self.apart.pop(n, None)
        return value

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        """Bring each operand to the epoch at which the node reads."""
        _, epoch = self._now

        def fetch(arg: Node) -> Any:
            value = self.apart.get(arg, self.env[arg]) if arg in self.again else self.env[arg]
            if n.op == "output":
                return value
            return self._lift(arg, value, epoch, n) if self.epoch.get(arg, 0) < epoch else value

        return torch.fx.node.map_arg((n.args, n.kwargs), fetch)

    def _chosen_before(self, n: Node, value: Any) -> Any:
        """Return what an earlier pass chose here in the reduced run: copies tie in its scores."""
        seen = chosen(n, self.run_of_reduced, self.row, self.batch)
        both = zip(*map(pytree.tree_leaves, (seen, value)), strict=True)
        return seen if all(a.shape == b.shape for a, b in both) else value

    def _run_apart(self, n: Node, epoch: int) -> None:
        carried = [arg for arg in n.all_input_nodes if self.on(arg)]
        mixed = any(self.epoch.get(arg, 0) != epoch for arg in carried)
        if not epoch or n.target in (SDPA, *POOLS) or n.op != "call_function":
            return
        if mixed or any(arg in self.apart for arg in carried):
            args, kwargs = torch.fx.node.map_arg(
                (n.args, n.kwargs), lambda arg: self.apart.get(arg, self.env[arg])
            )
            self.apart[n] = super().call_function(n.target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        n, epoch = self._now
        if epoch and target is SDPA:
            return self._attend(n, epoch, args, kwargs)
        if epoch and target in POOLS:
            return self._pool(n, epoch, target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def _reads_at(self, n: Node) -> int:
        """Return the epoch at which a node reads: 0 where the reduced program gave all back."""
        carried = [arg for arg in n.all_input_nodes if self.on(arg)]
        epoch = max((self.epoch.get(arg, 0) for arg in carried), default=0)
        self.again = set()
        twin = self.twins.get(n.name)
        if not epoch or twin is None or n.op == "output":
            return epoch
        own, other = ([a for a in pytree.tree_leaves(x.args) if is_tensor(a)] for x in (n, twin))
        for mine, its in zip(own, other, strict=False):
            if self.epoch.get(mine, 0) and self.on(mine):
                seen = self.run_of_reduced.values[its.name]
                if isinstance(seen, Tensor) and self._is_whole(mine, seen):
                    self.again |= {mine} if its.target is mine.target else set()
                    epoch = 0
        return epoch

    def _is_whole(self, n: Node, seen: Tensor) -> bool:
        full = self.env[n]
        if self._unchanged(self.epoch[n]):
            return False
        spots = [place for place in self.on(n) if full.ndim == seen.ndim]
        return bool(spots) and all(full.shape[place] == seen.shape[place] for place in spots)

    def _unchanged(self, epoch: int) -> bool:
        """Tell whether there are as many tokens as at first: one left, and one was fused."""
        return len(self.epochs[epoch].places) == len(self.epochs[0].places)

    def _yields_at(self, n: Node, value: Any, epoch: int) -> int:
        seen = self.run_of_reduced.values.get(n.name)
        if (
            not epoch
            or self._unchanged(epoch)
            or not isinstance(value, Tensor)
            or not isinstance(seen, Tensor)
        ):
            return epoch
        same = value.shape[1:] == seen.shape[1:] and len(value.shape) == len(seen.shape)
        spots = [place for place in self.on(n) if place]
        return 0 if spots and same else epoch

    def _lift(self, arg: Node, value: Any, epoch: int, reader: Node) -> Any:
        """Bring a value from ahead of some steps to them, as the mending table says."""
        spots = self.on(arg)
        if not spots or not isinstance(value, Tensor):
            return value
        held = reader.target is SDPA or reader not in self.feeding
        keys_alone = value.dtype == torch.bool and len(spots) == 1 and held
        self.positions = True
        kind = self.steps[epoch - 1].kind
        if kind == "prune" or (keys_alone and kind == "merge"):
            return value
        known = self.epoch.get(arg, 0)
        stream = self.sites[self.steps[0].site].node
        dims = self.case.axis.tokens.axes.of
        residual = dims(arg) == dims(stream) and value.is_floating_point()
        averaged = kind == "merge" and reader not in self.feeding and value.is_floating_point()
        matrix = self._copies(known, epoch, averages=residual or averaged)
        if self._forced(epoch) and reader.target is SDPA and value.is_floating_point():
            raise ForcedError
        for place, spot in spots.items():
            value = _along(value, matrix, place, spot)
        return value

    def _forced(self, epoch: int) -> bool:
        """Tell whether a real token had to merge into padding: its bias is that of no token."""
        if self.valid is None:
            return False
        after = self.epochs[epoch]
        return bool((self.valid & ~self.valid[after.places[after.moved]]).any())

    def _copies(self, known: int, epoch: int, averages: bool) -> Tensor:
        """Return [N, N]: each token's new value from those at an earlier epoch."""
        before, after = self.epochs[known], self.epochs[epoch]
        count = len(before.moved)
        if averages:
            made = torch.zeros(len(before.places), count, dtype=torch.float64)
            made[torch.arange(len(before.places)), before.places] = 1.0
            for step in self.steps[known:epoch]:
                made = step.weights @ made
        else:
            made = torch.zeros(len(after.places), count, dtype=torch.float64)
            made[torch.arange(len(after.places)), after.places] = 1.0
        spread = made[after.moved.clamp_min(0)]
        return torch.where(
            (after.moved < 0)[:, None], torch.eye(count, dtype=torch.float64), spread
        )

    def _reduce(self, n: Node, value: Tensor) -> Tensor:
        number = self.at_site[n.name]
        site = self.sites[n.name]
        rows = value.permute(site.places)
        self.frozen.append(rows)
        if self.epoch[n] != number - 1:
            raise NotEmulated(f"{n.name} is at epoch {self.epoch[n]} ahead of step {number}")
        self.epoch[n] = number
        if self.steps[number - 1].kind == "prune":
            return value
        matrix = self._copies(number - 1, number, averages=True)
        made = (matrix @ rows.double()).to(value.dtype)
        return made.permute([site.places.index(place) for place in range(3)])

    def _thaw(self, n: Node, value: Tensor, epoch: int) -> Tensor:
        """Give dropped tokens the value that they had at the site where they left."""
        (place,) = self.on(n)
        rows = value.movedim(place, 1).clone()
        for number in range(1, epoch + 1):
            gone = (self.epochs[number].moved < 0) & (self.epochs[number - 1].moved >= 0)
            rows[:, gone] = self.frozen[number - 1][:, gone]
        return rows.movedim(1, place)

    def _attend(self, n: Node, epoch: int, args: Any, kwargs: Any) -> Tensor:
        q, k, v, mask, dropout, causal = (*args, *(None, 0.0, False)[len(args) - 3 :])
        kwargs = dict(kwargs)
        mask, causal = kwargs.pop("attn_mask", mask), kwargs.pop("is_causal", causal)
        spot = self.on(n.args[1]).get(k.ndim - 2)  # type: ignore[arg-type]
        keys = self.epochs[epoch].keys
        if not isinstance(spot, Range) or bool(keys.all()):
            return SDPA(q, k, v, mask, dropout, causal, **kwargs)
        seen = cut(keys, spot, k.shape[-2]).expand(q.shape[-2], -1)
        if causal:
            seen = seen & torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        if mask is None:
            mask = seen
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, -torch.inf)
        return SDPA(q, k, v, mask, dropout, False, **kwargs).nan_to_num(0.0)

    def _pool(self, n: Node, epoch: int, target: Any, args: Any, kwargs: Any) -> Any:
        """Pool over what counts alone."""
        x, (dims, *rest) = args[0], args[1:]
        gone = {d % x.ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
        for place, spot in self.on(n.args[0]).items():  # type: ignore[arg-type]
            if place in gone and isinstance(spot, Range):
                counted = cut(self.epochs[epoch].pool, spot, x.shape[place])
                x = x.index_select(place, counted.nonzero()[:, 0])
        return target(x, dims, *rest, **kwargs)


def _along(value: Tensor, matrix: Tensor, place: int, spot: Range | str) -> Tensor:
    if not isinstance(spot, Range) or not spot.pure:
        raise NotEmulated("tokens share a dimension with another axis where they are read late")
    start, width = _start(spot, len(matrix), value.shape[place]), value.shape[place]
    own = matrix[start : start + width, start : start + width]
    moved = value.movedim(place, 0)
    wide = torch.complex128 if value.is_complex() else torch.float64
    flat = own.to(wide) @ moved.reshape(width, -1).to(wide)
    if value.dtype == torch.bool:
        return (flat > 0.5).reshape(moved.shape).movedim(0, place)
    flat = flat if value.is_floating_point() or value.is_complex() else flat.round()
    return flat.to(value.dtype).reshape(moved.shape).movedim(0, place)


def _start(spot: Range, count: int, width: int) -> int:
    return spot.start if isinstance(spot.start, int) else count - width


def cut(flags: Tensor, spot: Range, width: int) -> Tensor:
    """Return what flags [N] say of the tokens of a range."""
    start = _start(spot, len(flags), width)
    return flags[start : start + width]


def _proportional(case: Case) -> bool:
    return not any("proportional=false" in spec for spec in case.reduced.history)


def _epochs(steps: list[Step], valid: Tensor | None, proportional: bool) -> list[Epoch]:
    count = steps[0].weights.shape[1]
    every = torch.ones(count, dtype=torch.bool)
    found = [Epoch(torch.arange(count), torch.arange(count), every, every)]
    for step in steps:
        last = found[-1]
        inside = step.moved[last.moved.clamp_min(0)]
        moved = torch.where(last.moved < 0, -1, inside)
        places = last.places[step.places]
        alone = torch.zeros(count, dtype=torch.bool)
        alone[_spokesmen(moved, places, valid)] = True
        if step.kind == "merge":
            keys = every if proportional else alone
            keys, pool = (keys, every) if valid is None else (keys & valid, _weighed(moved, valid))
            found.append(Epoch(moved, places, keys, pool))
        else:
            found.append(Epoch(moved, places, alone, alone))
    return found


def _weighed(moved: Tensor, valid: Tensor) -> Tensor:
    """Tell which tokens pooling counts: not the padding that merged into real ones, of size 0."""
    real = torch.zeros(len(moved), dtype=torch.bool).index_fill(0, moved[valid], True)
    return valid | ~real[moved]


def _spokesmen(moved: Tensor, places: Tensor, valid: Tensor | None) -> Tensor:
    """Return one token of each group: one that is no padding, if there is one."""
    if valid is None:
        return places
    chosen = []
    for group, place in enumerate(places.tolist()):
        real = ((moved == group) & valid).nonzero()[:, 0].tolist()
        chosen.append(real[0] if real and not valid[place] else place)
    return torch.tensor(chosen)


def _thawed(case: Case) -> set[str]:
    """Find the values into which the reduced program puts dropped tokens back."""
    names = {node.name for node in case.normal.nodes()}
    nodes = [n for n in case.reduced.nodes() if n.target is SCATTER]
    found = {base(n.args[1], names, (*THROUGH, GATHER)) for n in nodes}  # type: ignore[arg-type]
    return {name for name in found if name is not None}


def _feeding(case: Case) -> set[Node]:
    """Return all that an attention call depends on, and the calls."""
    todo = [n for n in case.normal.nodes() if n.target is SDPA]
    found: set[Node] = set()
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def emulated(
    case: Case, run: Recorder, steps: list[Step], inputs: Inputs, row: int, valid: Tensor | None
) -> tuple[Emulator, Inputs]:
    """Run the original at full length with the choices that a run of the reduced program made."""
    emulator = Emulator(case, run, steps, row, valid)
    alone = tuple(
        x[row : row + 1] if "batch" in item.shape[:1] else x
        for x, item in zip(inputs, case.normal.signature.inputs, strict=True)
    )
    with torch.no_grad():
        outputs = emulator.run(*alone)
    return emulator, tuple(outputs)
