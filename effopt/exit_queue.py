"""Serving with exits: rows of several calls run together, and go on together when others leave.

Behind each exit fewer rows of a call are left, and small batches use a machine badly. A queue
ahead of each segment collects rows, of whatever call, until there are `size` of them or the oldest
has waited for `age` seconds. Larger figures give more rows a run, so more rows a second; a row
then waits longer, at most `age` ahead of each segment beside the runs themselves. Which is worth
it shows in `ExitQueue.counts` and `Ticket.seconds`.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from effopt.backend import Array
from effopt.engine import bind
from effopt.errors import EffoptError, UsageError
from effopt.exit_flow import Flow, Outputs, Rows, taken
from effopt.signature import Signature


class Ticket:
    """One submission; `ExitQueue` tells it what becomes of its rows."""

    def __init__(self, signature: Signature, outputs: Outputs, now: float) -> None:
        """Expect all rows of the outputs; `now` is when they came."""
        self.outputs = outputs
        self.seconds: float | None = None
        """How long the last row took to leave, None until then."""
        self._signature, self._came, self._left = signature, now, outputs.count
        self._error: EffoptError | None = None

    @property
    def done(self) -> bool:
        """Tell whether all rows have left, or could not be run."""
        return self.seconds is not None

    def leave(self, rows: int, now: float) -> bool:
        """Count rows that have left; return whether none is left."""
        self._left -= rows
        if not self._left:
            self.seconds = now - self._came
        return self.done

    def fail(self, error: EffoptError, now: float) -> None:
        """Keep the error of a run on these rows."""
        self._error, self.seconds = error, now - self._came

    def result(self) -> Any:
        """Return the outputs as a call of the engine does, rows in the order of the submission.

        Raises UsageError while rows are in a queue, and the error of a run that failed on them.
        """
        if not self.done:
            reason = f"{self._left} rows have not left yet"
            raise UsageError(reason, "call poll() of the queue until done, or flush()")
        if self._error is not None:
            raise self._error
        return self._signature.nest(self.outputs.flat())


@dataclass(frozen=True)
class Count:
    """How often a segment ran, and on how many rows in all."""

    runs: int = 0
    rows: int = 0

    @property
    def rows_per_run(self) -> float:
        """The mean size of a batch, 0 where none ran."""
        return self.rows / self.runs if self.runs else 0.0


class ExitQueue:
    """Queues ahead of the segments of an engine; made by `Engine.queue`.

    It is plain and of one thread: `submit` only puts rows in, and the calls `step`, `poll` and
    `flush` run segments. A server calls `poll` in its loop, whenever something may be due.
    """

    def __init__(
        self,
        flow: Flow,
        signature: Signature,
        *,
        size: int,
        age: float,
        clock: Callable[[], float],
    ) -> None:
        """Collect `size` rows, or as many as come in `age` seconds of a clock that never goes back.

        Raises UsageError for a size below 1 or an age below 0.
        """
        if size < 1 or not age >= 0:
            raise UsageError(f"a queue of size {size} and age {age}", "give size >= 1, age >= 0")
        self._flow, self._signature = flow, signature
        self._size, self._age, self._clock = size, age, clock
        self._lines = [_Line(flow) for _ in flow.parts]
        self._counts = [Count() for _ in flow.parts]
        self._open: dict[int, Ticket] = {}
        self._next = 0

    @property
    def counts(self) -> tuple[Count, ...]:
        """What each segment has run so far."""
        return tuple(self._counts)

    @property
    def waiting(self) -> tuple[int, ...]:
        """How many rows are ahead of each segment."""
        return tuple(len(line) for line in self._lines)

    def submit(self, *arrays: Any, **named: Any) -> Ticket:
        """Put in the rows of one call, which are given as to the engine; nothing runs yet.

        Thresholds hold for these rows alone. Raises UsageError as the engine does.
        """
        owner, now = self._next, self._clock()
        rows = self._flow.begin(bind(self._signature, arrays, named), owner)
        ticket = Ticket(self._signature, Outputs(self._flow, len(rows)), now)
        self._next += 1
        self._open[owner] = ticket
        self._lines[0].add(rows, now)
        return ticket

    def step(self) -> bool:
        """Run one segment once if something is due; return whether there was.

        Rows that have waited for `age` go first, those that have waited longest ahead of others, so
        that none starve; then a full batch, of the last segment that has one.
        """
        now, lines = self._clock(), list(enumerate(self._lines))
        groups = [(group, place) for place, line in lines for group in line.groups()]
        late = [pair for pair in groups if now - pair[0].since >= self._age]
        full = [pair for pair in groups if len(pair[0]) >= self._size]
        if not late and not full:
            return False
        group, place = min(late, key=_since) if late else max(full, key=lambda pair: pair[1])
        self._run(place, group.take(self._size))
        return True

    def poll(self) -> int:
        """Run all that is due; return how many times a segment ran."""
        runs = 0
        while self.step():
            runs += 1
        return runs

    def flush(self) -> None:
        """Run all rows, due or not: segment by segment, so that many stay together."""
        for place, line in enumerate(self._lines):
            while group := next(line.groups(), None):
                self._run(place, group.take(self._size))

    def _run(self, place: int, rows: Rows) -> None:
        """Run rows, and let those that are left join the next queue.

        Where it fails, the rows of each call run apart: what one call gave must not fail another.
        """
        try:
            step = self._flow.step(place, rows)
        except EffoptError as error:
            owners = np.unique(rows.owners)
            if len(owners) == 1:
                self._fail(int(owners[0]), error)
                return
            for owner in owners:
                self._run(place, self._flow.take(rows, np.flatnonzero(rows.owners == owner)))
            return
        count = self._counts[place]
        self._counts[place] = Count(count.runs + 1, count.rows + len(rows))
        self._put(rows, step.ready, leave=False)
        self._put(step.left, step.answers, leave=True)
        if len(step.rest):
            self._lines[place + 1].add(step.rest, self._clock())

    def _put(self, rows: Rows, named: Mapping[str, Array], *, leave: bool) -> None:
        """Give outputs of rows to the calls that they are of."""
        places = dict.fromkeys(named, 0) if leave else self._flow.parts[0].ready
        for owner in map(int, np.unique(rows.owners)):
            ticket, own = self._open[owner], np.flatnonzero(rows.owners == owner)
            mine = {
                name: array if (place := places[name]) is None else taken(array, own, place)
                for name, array in named.items()
            }
            ticket.outputs.put(mine, rows.places[own])
            if leave and ticket.leave(len(own), self._clock()):
                del self._open[owner]

    def _fail(self, owner: int, error: EffoptError) -> None:
        """End a call with an error; its other rows need not run."""
        self._open.pop(owner).fail(error, self._clock())
        for line in self._lines:
            line.drop(owner)


def _since(pair: tuple["_Group", int]) -> float:
    return pair[0].since


class _Group:
    """Rows ahead of one segment that may run together, in the order that they came."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._waiting = deque[tuple[float, Rows]]()

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self._waiting)

    @property
    def since(self) -> float:
        """When the oldest of them came."""
        return self._waiting[0][0]

    def add(self, rows: Rows, now: float) -> None:
        self._waiting.append((now, rows))

    def take(self, size: int) -> Rows:
        """Take the `size` oldest rows out, or all."""
        found = list[Rows]()
        while self._waiting and size:
            since, rows = self._waiting.popleft()
            order = np.arange(len(rows))
            if len(rows) > size:
                self._waiting.appendleft((since, self._flow.take(rows, order[size:])))
            found.append(self._flow.take(rows, order[:size]))
            size -= len(found[-1])
        return self._flow.join(found)

    def drop(self, owner: int) -> None:
        """Take the rows of one call out."""
        for since, rows in [self._waiting.popleft() for _ in range(len(self._waiting))]:
            kept = np.flatnonzero(rows.owners != owner)
            if len(kept):
                self._waiting.append((since, self._flow.take(rows, kept)))


class _Line:
    """All rows ahead of one segment, apart where they cannot run together."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._groups: dict[Hashable, _Group] = {}

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def groups(self) -> Iterator[_Group]:
        """Iterate over the groups that have rows; what is empty is forgotten."""
        self._groups = {kind: group for kind, group in self._groups.items() if len(group)}
        yield from self._groups.values()

    def add(self, rows: Rows, now: float) -> None:
        self._groups.setdefault(_kind(self._flow, rows), _Group(self._flow)).add(rows, now)

    def drop(self, owner: int) -> None:
        for group in self._groups.values():
            group.drop(owner)


def _kind(flow: Flow, rows: Rows) -> Hashable:
    """Return what rows must have alike to run together: sizes, and all of values without rows."""
    found = list[Hashable]()
    for name, array in rows.values.items():
        place, sizes = flow.rows.get(name), array.shape
        if place is None:
            found.append((name, sizes, hashlib.sha256(array.tobytes()).digest()))
        else:
            found.append((name, sizes[:place], sizes[place + 1 :]))
    return tuple(found)
