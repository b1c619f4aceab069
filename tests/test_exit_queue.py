"""Queues ahead of segments: which rows run together, when, and what becomes of the rest.

The segments are arithmetic: a row x [2] leaves behind the first where x[0] is large, behind the
second where x[1] is, and answers say who computed them.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effopt.backend import Array
from effopt.errors import UsageError, VerificationError
from effopt.exit_flow import Flow, Part
from effopt.exit_queue import ExitQueue, Ticket
from effopt.signature import EXIT_INDEX, TAU, Signature, TensorSpec

TAUS = (0.5, 0.5)
BAD = -7.0
"""A value that the second segment cannot take."""


def spec(name: str, *shape: int | str, kind: str = "float32", default: Any = None) -> TensorSpec:
    return TensorSpec(name, kind, shape, name, default)


SIGNATURE = Signature(
    (spec("x", "batch", "wide"), spec("shift", 1), spec(TAU, 2, default=TAUS)),
    (
        spec("y", "batch"),
        spec("turned", "wide", "batch"),
        spec("shifted", 1),
        spec(EXIT_INDEX, "batch", kind="int64"),
    ),
    {"dict": {"y": 0, "turned": 1, "shifted": 2, EXIT_INDEX: 3}},
)


@dataclass
class Segments:
    """Keeps the rows of x that each segment ran on."""

    ran: list[tuple[int, list[float]]] = field(default_factory=list)

    def flow(self) -> Flow:
        parts = (
            Part(
                ("x", "shift"),
                True,
                ("y",),
                {"turned": 1, "shifted": None},
                ("h", "more"),
                self.first,
            ),
            Part(("h", "more"), True, ("y",), {}, (), self.second),
            Part(("h", "shift"), False, ("y",), {}, (), self.third),
        )
        rows = {"x": 0, "h": 1}
        outputs = tuple(spec.name for spec in SIGNATURE.outputs)
        return Flow(parts, rows, ("x", "shift"), outputs)

    def first(self, arrays: list[Array]) -> list[Array]:
        x, shift = arrays
        self.ran.append((1, x[:, 0].tolist()))
        return [x[:, 0], x[:, 0] + 100, x.T * 2, shift * 2, x.T.copy(), shift + 1]

    def second(self, arrays: list[Array]) -> list[Array]:
        h, more = arrays
        self.ran.append((2, h[0].tolist()))
        if (h[1] == BAD).any():
            raise UsageError("a row is bad", "give another")
        return [h[1], h[0] + 200 + more]

    def third(self, arrays: list[Array]) -> list[Array]:
        h, shift = arrays
        self.ran.append((3, h[0].tolist()))
        return [h[0] + 300 + shift]


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def queue(
    size: int = 4, age: float = 1.0, segments: Segments | None = None
) -> tuple[ExitQueue, Clock, Segments]:
    clock, segments = Clock(), segments or Segments()
    made = ExitQueue(segments.flow(), SIGNATURE, size=size, age=age, clock=clock)
    return made, clock, segments


def rows(*pairs: tuple[float, float], wide: int = 2) -> Array:
    """Return [n, wide]: pairs, and zeros."""
    return np.pad(np.array(pairs, np.float32), ((0, 0), (0, wide - 2)))


ZERO = np.zeros(1, np.float32)
STAY, SECOND, FIRST = (0.0, 0.0), (0.1, 1.0), (1.0, 0.0)


def submit(made: ExitQueue, *pairs: tuple[float, float], shift: float = 0) -> Ticket:
    return made.submit(rows(*pairs), ZERO + np.float32(shift))


def exits(ticket: Ticket) -> list[int]:
    found: list[int] = ticket.result()[EXIT_INDEX].tolist()
    return found


# --- one call ---------------------------------------------------------------------------------


def test_rows_leave_with_their_answers_in_their_places() -> None:
    made, _, segments = queue()
    ticket = submit(made, STAY, FIRST, SECOND, FIRST)
    assert made.poll() == 1, "four rows are a full batch; the two that are left are not"
    assert made.waiting == (0, 2, 0)
    assert not ticket.done
    made.flush()
    found = ticket.result()
    assert list(found) == ["y", "turned", "shifted", EXIT_INDEX]
    assert found[EXIT_INDEX].tolist() == [3, 1, 2, 1]
    assert found["y"] == pytest.approx([300, 101, 201.1, 101])
    assert found["turned"].tolist() == (rows(STAY, FIRST, SECOND, FIRST).T * 2).tolist()
    assert found["shifted"] == 0
    assert [place for place, _ in segments.ran] == [1, 2, 3]


def test_a_flow_alone_does_not_run_on_no_rows_and_copies_none_that_stay() -> None:
    segments, x = Segments(), rows(STAY, STAY)
    flow = segments.flow()
    begun = flow.begin([x, ZERO, np.array(TAUS, np.float32)])
    step = flow.step(0, begun)
    assert len(step.left) == 0
    assert step.rest.values["shift"] is begun.values["shift"]
    assert "x" not in step.rest.values, "nobody reads it any more"
    again = flow.step(1, step.rest)
    assert again.rest.values["h"] is step.rest.values["h"]
    segments.ran.clear()
    never = flow.run([rows(FIRST, FIRST), ZERO, np.array(TAUS, np.float32)])
    assert never[-1].tolist() == [1, 1]
    assert len(segments.ran) == 1


def test_a_score_at_its_threshold_leaves() -> None:
    made, _, _ = queue(size=1)
    ticket = submit(made, (0.5, 0.0), (0.4999, 0.5))
    made.poll()
    assert exits(ticket) == [1, 2]


def test_wrong_arguments_are_told_at_once() -> None:
    made, _, _ = queue()
    with pytest.raises(UsageError, match="there is no input 'z'"):
        made.submit(z=1)
    with pytest.raises(UsageError, match="size 0 and age 1"):
        queue(size=0)
    with pytest.raises(UsageError, match="age nan"):
        queue(age=float("nan"))
    assert made.waiting == (0, 0, 0)


def test_a_result_that_is_not_there_yet_says_so() -> None:
    made, _, _ = queue()
    with pytest.raises(UsageError, match="2 rows have not left yet") as caught:
        submit(made, STAY, FIRST).result()
    assert "flush()" in caught.value.remedy


# --- several calls ----------------------------------------------------------------------------


def test_rows_of_several_calls_fill_a_batch() -> None:
    made, _, segments = queue(size=3)
    tickets = [submit(made, (place / 100, 0.0)) for place in range(3)]
    assert made.poll() == 3
    assert segments.ran == [(n, pytest.approx([0.0, 0.01, 0.02])) for n in (1, 2, 3)]
    assert [ticket.result()["y"][0] for ticket in tickets] == pytest.approx([300, 300.01, 300.02])
    assert [count.rows_per_run for count in made.counts] == [3, 3, 3]


def test_rows_wait_ahead_of_a_later_segment_for_those_of_another_call() -> None:
    made, _, segments = queue(size=2)
    one, two = submit(made, STAY, FIRST), submit(made, FIRST, SECOND)
    assert made.poll() == 3
    assert segments.ran[-1] == (2, pytest.approx([0.0, 0.1])), "one row of each"
    assert two.done
    assert not one.done
    assert made.waiting == (0, 0, 1)
    assert [(count.runs, count.rows) for count in made.counts] == [(2, 4), (1, 2), (0, 0)]
    assert made.counts[2].rows_per_run == 0


def test_a_large_call_is_cut() -> None:
    made, _, segments = queue(size=2)
    ticket = submit(made, *[(place / 100, 0.0) for place in range(5)])
    made.flush()
    assert [len(ran) for _, ran in segments.ran] == [2, 2, 1] * 3
    assert ticket.result()["y"] == pytest.approx([300, 300.01, 300.02, 300.03, 300.04])
    assert ticket.result()["turned"].shape == (2, 5)


def test_thresholds_are_those_of_each_call() -> None:
    made, _, _ = queue(size=3)
    x = rows((0.2, 0.2))
    taus = ([0.1, 9], [9, 0.1], [9, 9])
    tickets = [made.submit(x, ZERO, tau=tau) for tau in taus]
    made.poll()
    made.flush()
    assert [exits(ticket) for ticket in tickets] == [[1], [2], [3]]


def test_other_sizes_and_other_values_without_rows_do_not_mix() -> None:
    made, _, segments = queue(size=2)
    plain, shifted = submit(made, STAY), submit(made, STAY, shift=5)
    wide = made.submit(rows(STAY, wide=4), ZERO)
    assert made.poll() == 0
    made.flush()
    assert len(segments.ran) == 9
    assert [float(t.result()["y"][0]) for t in (plain, shifted, wide)] == [300, 305, 300]
    assert wide.result()["turned"].shape == (4, 1)


ROW = st.sampled_from([STAY, SECOND, FIRST])


@given(
    calls=st.lists(st.lists(ROW, min_size=1, max_size=5), min_size=1, max_size=6),
    size=st.integers(1, 7),
    waits=st.lists(st.sampled_from([0.0, 0.4, 1.1]), min_size=6, max_size=6),
)
def test_every_call_gets_what_it_gets_alone(
    calls: list[list[tuple[float, float]]], size: int, waits: list[float]
) -> None:
    made, clock, _ = queue(size=size)
    tickets = []
    for call, wait in zip(calls, waits, strict=False):
        tickets.append(submit(made, *call, shift=len(call) % 2))
        clock.now += wait
        made.poll()
    made.flush()
    assert made.waiting == (0, 0, 0)
    for call, ticket in zip(calls, tickets, strict=True):
        shift = ZERO + np.float32(len(call) % 2)
        alone = Segments().flow().run([rows(*call), shift, np.array(TAUS, np.float32)])
        for got, want in zip(ticket.result().values(), alone, strict=True):
            np.testing.assert_array_equal(got, want)


# --- time -------------------------------------------------------------------------------------


def test_a_row_runs_when_it_is_old() -> None:
    made, clock, segments = queue(size=4, age=1.0)
    ticket = submit(made, STAY)
    clock.now = 0.9
    assert not made.step()
    clock.now = 1.0
    assert made.poll() == 1
    assert made.waiting == (0, 1, 0), "it waits anew ahead of each segment"
    clock.now = 1.9
    assert made.poll() == 0
    for now in (2.0, 3.0):
        clock.now = now
        assert made.poll() == 1
    assert len(segments.ran) == 3
    assert ticket.seconds == 3.0


def test_an_old_row_takes_younger_ones_along() -> None:
    made, clock, segments = queue(size=4, age=1.0)
    submit(made, (0.01, 0.0))
    clock.now = 0.9
    submit(made, (0.02, 0.0))
    clock.now = 1.0
    made.poll()
    assert segments.ran == [(1, pytest.approx([0.01, 0.02]))]


def test_full_batches_do_not_starve_an_odd_row() -> None:
    """A row of a size of its own is run once it is old, though full batches come ever faster."""
    made, clock, _ = queue(size=2, age=1.0)
    odd = made.submit(rows(STAY, wide=3), ZERO)
    for _ in range(16):
        submit(made, STAY, STAY)
        clock.now += 0.5
        made.step()
    assert odd.done
    assert sum(made.waiting), "others do wait"


def test_of_old_rows_the_oldest_goes_first() -> None:
    made, clock, segments = queue(size=9, age=1.0)
    submit(made, (0.01, 0.0), shift=1)
    clock.now = 0.5
    submit(made, (0.02, 0.0), shift=2)
    clock.now = 9.0
    assert made.step()
    assert made.step()
    assert [ran for _, ran in segments.ran] == [pytest.approx([0.01]), pytest.approx([0.02])]


def test_of_full_batches_the_deepest_goes_first() -> None:
    made, _, segments = queue(size=2)
    for _ in range(2):
        submit(made, STAY, STAY)
    for _ in range(4):
        made.step()
    assert [place for place, _ in segments.ran] == [1, 2, 3, 1]


# --- runs that fail ---------------------------------------------------------------------------


def test_a_bad_row_fails_its_own_call_alone() -> None:
    made, clock, _ = queue(size=4)
    good, bad = submit(made, STAY, SECOND), submit(made, (0.0, BAD), STAY)
    made.flush()
    assert exits(good) == [3, 2]
    assert bad.done
    assert bad.seconds == clock.now
    with pytest.raises(UsageError, match="a row is bad"):
        bad.result()


def test_other_rows_of_a_call_that_failed_do_not_run() -> None:
    made, _, segments = queue(size=2)
    bad = submit(made, (0.0, BAD), (0.0, BAD), (0.01, 0.0), (0.02, 0.0), (0.03, 0.0))
    other = submit(made, (0.04, 0.0))
    made.flush()
    assert bad.done
    ran = [row for place, found in segments.ran if place > 1 for row in found]
    assert ran == pytest.approx([0.0, 0.0, 0.04, 0.04])
    assert exits(other) == [3]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_segment_that_loses_rows_is_told(lost: int) -> None:
    """The score or the answers of a segment are of fewer rows than it was given."""

    class Short(Segments):
        def first(self, arrays: list[Array]) -> list[Array]:
            made = super().first(arrays)
            made[lost] = made[lost][:-1]
            return made

    made, _, _ = queue(segments=Short())
    ticket = submit(made, STAY, STAY)
    made.flush()
    with pytest.raises(VerificationError, match="segment 1 gives"):
        ticket.result()
