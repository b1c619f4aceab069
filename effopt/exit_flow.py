"""Rows on their way through segments: some leave at each exit, those that are left go on.

Free of torch and of any runtime: what runs a segment is a function of arrays. `Flow.run` takes one
batch all the way; `effopt.exit_queue` lets rows of several calls go on together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from effopt.backend import Array
from effopt.errors import VerificationError
from effopt.signature import EXIT_INDEX


@dataclass(frozen=True)
class Part:
    """One segment: `run` takes the values `reads` and gives, in this order, what follows.

    A score [n] float32 of its rows if `scored`; `answers`, outputs as they are for rows that leave
    here; `ready`, outputs that no exit changes, each with the dimension at which it counts rows,
    or None; `handed`, values that later segments read.
    """

    reads: tuple[str, ...]
    scored: bool
    answers: tuple[str, ...]
    ready: Mapping[str, int | None]
    handed: tuple[str, ...]
    run: Callable[[list[Array]], list[Array]]


@dataclass(frozen=True)
class Rows:
    """n rows ahead of a segment: `values` by name, and their thresholds `tau` [n, E].

    `owners` [n] says of which call a row is, and `places` [n] which row of that call.
    """

    values: Mapping[str, Array]
    tau: Array
    owners: Array
    places: Array

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Step:
    """What a segment made of rows: those that leave with `answers`, and the `rest`.

    `ready` are outputs of all rows that came, whether they leave or not.
    """

    left: Rows
    answers: Mapping[str, Array]
    ready: Mapping[str, Array]
    rest: Rows


@dataclass(frozen=True)
class Flow:
    """Segments in order. `rows` says at which dimension a value counts rows, if it has rows.

    `inputs` names what a call takes ahead of the thresholds, `outputs` what it gives, in order:
    what segments give, and EXIT_INDEX.
    """

    parts: tuple[Part, ...]
    rows: Mapping[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @cached_property
    def _later(self) -> tuple[frozenset[str], ...]:
        """What is read behind each segment."""
        behind = (self.parts[place + 1 :] for place in range(len(self.parts)))
        return tuple(frozenset(n for part in parts for n in part.reads) for parts in behind)

    def begin(self, inputs: Sequence[Array], owner: int = 0) -> Rows:
        """Take the inputs of one call, the thresholds [E] last."""
        *arrays, tau = inputs
        given = dict(zip(self.inputs, arrays, strict=True))
        read = self._later[0].union(self.parts[0].reads)
        values = {name: array for name, array in given.items() if name in read}
        count = next(a.shape[self.rows[n]] for n, a in values.items() if n in self.rows)
        thresholds = np.broadcast_to(tau, (count, len(tau)))
        return Rows(values, thresholds, np.full(count, owner), np.arange(count))

    def step(self, place: int, rows: Rows) -> Step:
        """Run one segment; what leaves there are the rows whose score is not below tau."""
        part, count = self.parts[place], len(rows)
        given = iter(part.run([rows.values[name] for name in part.reads]))
        score = next(given) if part.scored else None
        answers = {name: next(given) for name in part.answers}
        ready = {name: next(given) for name in part.ready}
        known = {**rows.values, **{name: next(given) for name in part.handed}}
        lengths = {len(array) for array in answers.values()}
        if lengths != {count} or (score is not None and score.shape != (count,)):
            reason = f"segment {place + 1} gives answers of {sorted(lengths)} rows for {count}"
            raise VerificationError(reason, "build the engine again")
        done = np.ones(count, bool) if score is None else score >= rows.tau[:, place]
        leaving, staying = np.flatnonzero(done), np.flatnonzero(~done)
        chosen = {name: taken(array, leaving, 0) for name, array in answers.items()}
        chosen[EXIT_INDEX] = np.full(len(leaving), place + 1, dtype=np.int64)
        left = self.take(replace(rows, values={}), leaving)
        later = {name: array for name, array in known.items() if name in self._later[place]}
        return Step(left, chosen, ready, self.take(replace(rows, values=later), staying))

    def take(self, rows: Rows, which: Array) -> Rows:
        """Take some rows, by ascending number; all of them are not copied."""
        if len(which) == len(rows):
            return rows
        values = {
            name: taken(array, which, self.rows[name]) if name in self.rows else array
            for name, array in rows.values.items()
        }
        return Rows(values, rows.tau[which], rows.owners[which], rows.places[which])

    def join(self, several: Sequence[Rows]) -> Rows:
        """Put rows together that are equal in what they share: sizes, and values without rows."""
        if len(several) == 1:
            return several[0]
        values = {
            name: np.concatenate([rows.values[name] for rows in several], axis=self.rows[name])
            if name in self.rows
            else array
            for name, array in several[0].values.items()
        }
        columns = zip(*((rows.tau, rows.owners, rows.places) for rows in several), strict=True)
        tau, owners, places = (np.concatenate(column) for column in columns)
        return Rows(values, tau, owners, places)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run one call, thresholds [E] last; outputs in order. Nothing runs on no rows."""
        rows = self.begin(inputs)
        found = Outputs(self, len(rows))
        for place in range(len(self.parts)):
            here, step = rows.places, self.step(place, rows)
            found.put(step.answers, step.left.places)
            found.put(step.ready, here)
            rows = step.rest
            if not len(rows):
                break
        return found.flat()


@dataclass
class Outputs:
    """The outputs of one call, filled in as its rows leave."""

    flow: Flow
    count: int
    _arrays: dict[str, Array] = field(default_factory=dict)

    def put(self, named: Mapping[str, Array], places: Array) -> None:
        """Put values of some rows in their places; one without rows is the same for all."""
        for name, array in named.items():
            whole = len(places) == self.count and bool((np.diff(places) > 0).all())
            if whole or (place := self._rows_at(name)) is None:
                self._arrays[name] = array
            elif len(places):
                if name not in self._arrays:
                    shape = (*array.shape[:place], self.count, *array.shape[place + 1 :])
                    self._arrays[name] = np.empty(shape, array.dtype)
                np.moveaxis(self._arrays[name], place, 0)[places] = np.moveaxis(array, place, 0)

    def _rows_at(self, name: str) -> int | None:
        return self.flow.parts[0].ready.get(name, 0)

    def flat(self) -> list[Array]:
        """Return all, in order."""
        return [self._arrays[name] for name in self.flow.outputs]


def taken(array: Array, which: Array, axis: int) -> Array:
    """Take places of an array along one dimension; all of them are not copied."""
    return array if len(which) == array.shape[axis] else np.take(array, which, axis=axis)
