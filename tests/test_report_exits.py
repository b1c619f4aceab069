"""What the report says of calibrated exits: in the text, on the page, and of facts that are not."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from effopt.errors import UnsafeFileError
from effopt.promise import Promise
from effopt.report import Latency, Report, StepRecord
from effopt.report_exits import read_exits
from tests.test_report import EVIL, Page

NEVER = float("inf")
SPEC = "exit-early (finish)"
PROMISE = Promise(
    rule="ltt",
    epsilon=0.01,
    delta=0.05,
    loss="disagree",
    reference="self",
    unit="sample",
    output="logits",
    position=None,
    samples=600,
    fitted=400,
    rows="ab" * 32,
    engine="ort on cpu",
    graph="cd" * 32,
    tau=(0.9, 0.9),
    index=2,
    risk=0.00333,
    shares=(0.55, 0.25, 0.2),
    cost=0.5633,
    grid=((NEVER, NEVER), (0.95, 0.95), (0.9, 0.9), (0.8, 0.8), (0.7, 0.7)),
    risks=(0.0, 0.00167, 0.00333, 0.01, 0.2),
    bounds=(0.005, 0.0079, 0.0096, 0.0197, 0.23),
)
NONE = replace(
    PROMISE,
    tau=(NEVER, NEVER),
    index=0,
    risk=0.0,
    shares=(0.0, 0.0, 1.0),
    cost=1.02,
    bounds=(0.005, 0.0105, 0.02, 0.03, 0.3),
)


def exits(tail: str = "") -> list[dict[str, Any]]:
    return [
        {"path": f"vit.layers.{block}{tail}", "block": block, "share": share}
        for block, share in ((3, 0.333), (7, 0.667))
    ]


def report(promise: object = PROMISE, places: object = None, spec: str = SPEC) -> Report:
    record = promise.to_json() if isinstance(promise, Promise) else promise
    facts = {"promise": record, "exits": exits() if places is None else places}
    return Report("Net", "cpu", steps=(StepRecord(spec, True, facts=facts),))


def words_of(made: Report) -> str:
    """Return what the page shows, without the record behind it."""
    shown = made.html().split("<script")[0]
    return " ".join(" ".join(Page(shown).words).split())


TEXT = """\
 exit-early (finish)
block   where          threshold   rows that leave   work so far
────────────────────────────────────────────────────────────────
3       vit.layers.3      0.9000            55.0 %        33.3 %
7       vit.layers.7      0.9000            25.0 %        66.7 %
end     -                      -            20.0 %       100.0 %
promise:  disagree against the engine that never exits at most 1.00% with 95%
          confidence (ltt, 600 samples)
risk:     0.333 % on the calibration rows, bounded by 0.960 %
cost:     a row costs 0.563 of the whole model on average
note:     this is of all rows together: of those that leave early a larger part
          loses
"""


def test_the_text_has_the_table_and_the_promise() -> None:
    assert report().text().split("Exits of")[1] == TEXT


def test_the_text_says_why_nothing_leaves() -> None:
    text = report(NONE).text()
    assert text.count("never ") == 3
    assert "risk:     0 % on the calibration rows\n" in text
    assert "the highest threshold that was tried the loss\n          is 0.167 %, bounded" in text
    few = replace(NONE, risks=(0.0, 0.0, 0.01, 0.02, 0.3), samples=200)
    assert "200 samples are too few" in report(few).text()
    untried = replace(NONE, grid=NONE.grid[:1], risks=(0.0,), bounds=(0.005,))
    assert "no threshold was tried" in report(untried).text()


def test_a_mean_over_calibrations_is_not_sold_as_a_bound_of_this_one() -> None:
    crc = replace(PROMISE, rule="crc", delta=None)
    assert "crc bounds the mean over calibrations" in " ".join(report(crc).text().split())


@pytest.mark.parametrize("promise", [PROMISE, NONE, replace(PROMISE, rule="crc", delta=None)])
@pytest.mark.parametrize("tail", ["", "x" * 200, EVIL])
def test_the_text_keeps_to_its_width(promise: Promise, tail: str) -> None:
    text = report(promise, exits(tail), f"{SPEC}{tail}").text()
    assert max(map(len, text.splitlines())) <= 80
    assert not [char for char in text if char != "\n" and not char.isprintable()]


@pytest.mark.parametrize("promise", [PROMISE, NONE])
def test_the_page_has_the_table_and_both_pictures(promise: Promise) -> None:
    made = report(promise)
    page, words = Page(made.html()), words_of(made)
    assert page.elements["table"] == 2
    assert page.elements["svg"] == 2
    assert (page.elements["path"], page.elements["circle"]) == (2, 1)
    for said in ("Early exits", "vit.layers.7", "exit 2, block 7", "at most 1.00%", "never"):
        assert said in words


def places(made: Report, kind: str) -> list[tuple[float, float]]:
    """Read the places of a line in the picture of losses."""
    path = made.html().split(f'class="{kind}"')[0].rsplit('d="M', 1)[1].split('"')[0]
    return [tuple(map(float, pair.split())) for pair in path.split("L")]  # type: ignore[misc]


def test_lines_end_where_they_leave_the_picture() -> None:
    top = 3 * PROMISE.epsilon  # the picture reaches three times as far as what is allowed
    (_, foot), *_, (x, y) = places(report(), "curve")
    assert foot > y == 14.0
    start, end = places(report(), "curve")[3][0], places(report(), "curve")[0][0]
    step = (start - end) / 3
    assert x == pytest.approx(start + step * (top - 0.01) / (0.2 - 0.01), abs=0.11)  # a tenth each


def test_the_dot_is_at_the_setting_that_was_taken() -> None:
    made = report()
    dot = made.html().split("<circle ")[1]
    spot = [float(dot.split(f'{name}="')[1].split('"')[0]) for name in ("cx", "cy")]
    assert spot == pytest.approx(places(made, "curve")[PROMISE.index], abs=0.1)


def test_settings_are_numbered_where_exits_have_thresholds_of_their_own() -> None:
    own = replace(PROMISE, grid=((NEVER, NEVER), *((0.9 - n / 9, 0.8) for n in range(4))))
    assert "setting: further right" in words_of(report(own))
    assert "threshold of all exits: further right" in words_of(report())


def test_bars_are_as_long_as_their_shares() -> None:
    bars = report().html().split("<rect ")[1:]
    wide = [float(bar.split('width="')[1].split('"')[0]) for bar in bars]
    assert [w / wide[0] for w in wide] == pytest.approx([1, 25 / 55, 20 / 55], abs=1e-3)


def test_hostile_names_add_no_element() -> None:
    plain, hostile = Page(report().html()), Page(report(places=exits(EVIL), spec=EVIL).html())
    assert hostile.elements == plain.elements
    assert hostile.attributes == plain.attributes
    assert "url(" not in report().html()


HOSTILE: list[object] = [
    *(None, True, -1, 5, 10**400, 2.5, float("nan"), float("inf"), "", "x", [], {}, [[]], [{}]),
    *([None, 1], {"a": 1}, [float("nan")] * 3, [10**400] * 3, ["0.5x"] * 3, [0.1] * 9, [[0.1]] * 5),
]


def short(given: object) -> str:
    return repr(given)[:12]


@pytest.mark.parametrize("given", HOSTILE, ids=short)
def test_a_damaged_promise_is_left_out(given: object) -> None:
    made = report(given)
    assert "Exits of" not in made.text()
    assert Page(made.html()).elements["svg"] == 0


@pytest.mark.parametrize("name", PROMISE.to_json())
def test_a_field_may_be_any_json(name: str) -> None:
    record = PROMISE.to_json()
    for given in HOSTILE:
        made = report({**record, name: given})
        if read_exits(made.steps):
            assert max(map(len, made.text().splitlines())) <= 80
            assert Page(made.html()).elements["svg"] == 2
    lacking = {key: value for key, value in record.items() if key != name}
    assert not read_exits(report(lacking).steps)


ODD_PLACES = [[{}, {}], [{"path": 5, "block": -1, "share": 7}, {"block": True}]]


@pytest.mark.parametrize("given", [*HOSTILE[1:], *ODD_PLACES], ids=short)
def test_places_of_exits_may_be_any_json(given: object) -> None:
    made = report(places=given)
    assert "- - 0.9000 55.0 % - - - 0.9000 25.0 % - end" in " ".join(made.text().split())
    assert Page(made.html()).elements["svg"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": []}, "loss is []"),
        ({"rule": "luck"}, "rule is 'luck'"),
        ({"epsilon": "0.1"}, "epsilon is '0.1'"),
        ({"delta": None}, "not of the same exits and settings"),
        ({"index": 5}, "not of the same exits and settings"),
        ({"shares": [0.5, 0.5]}, "not of the same exits and settings"),
        ({"bounds": [0.0]}, "not of the same exits and settings"),
        ({"grid": []}, "not of the same exits and settings"),
        ({"risks": [0.0, 0.0, 0.0, 0.0, 10**400]}, "risks is"),
        ({"tau": [float("nan"), 0.1]}, "tau is"),
        ({"tau": [None, 0.1]}, "tau is"),
        ({"tau": ["nan", 0.1]}, "tau is"),
        ({"tau": [10**400, 0.1]}, "tau is"),
        ({"grid": [10**400]}, "grid is"),
        ({"loss": "error", "unit": "token"}, "not of the same exits and settings"),
        ({"more": 1}, "'more' is missing, or there without a meaning"),
    ],
)
def test_a_damaged_promise_is_refused_by_its_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsafeFileError, match="promise of the exits is damaged") as caught:
        Promise.from_json({**PROMISE.to_json(), **change})
    assert message in str(caught.value)


def test_a_promise_comes_back_the_same() -> None:
    text = json.dumps(PROMISE.to_json(), allow_nan=False)
    assert Promise.from_json(json.loads(text)) == PROMISE
    assert Promise.from_json(json.loads(json.dumps(NONE.to_json(), allow_nan=False))) == NONE


def test_a_threshold_that_every_score_reaches_does_not_come_back_as_never() -> None:
    made = replace(PROMISE, tau=(-NEVER, 0.9), grid=(*PROMISE.grid[:-1], (-NEVER, -NEVER)))
    record = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert record["tau"] == ["-inf", 0.9]
    assert Promise.from_json(record) == made


# --- latency


def timed(mean: float | None, tail: float | None) -> Report:
    base = Latency("exact export", 1, 84.0, 92.4, 109.2, 81.5, 88.2, 120, 2, mean_ms=mean)
    ours = replace(
        base,
        variant="effopt",
        median_ms=31.5,
        high_ms=53.6,
        p95_ms=tail,
        speedup=2.03,
        speedup_low=1.98,
        speedup_high=2.11,
        baseline="exact export",
    )
    return Report("Net", "cpu", latency=(base, ours))


@pytest.mark.parametrize("write", [Report.text, words_of])
def test_means_are_told_where_times_differ_by_input(write: Callable[[Report], str]) -> None:
    plain, told = (" ".join(write(made).split()) for made in (timed(None, None), timed(41.5, 82.0)))
    for words in ("p95", "ean", "speed-up of means", "82.0"):
        assert words in told
    assert "p95" not in plain
    assert "speed-up over" in plain


def test_the_speedup_in_front_is_of_the_engine_as_it_is_used() -> None:
    base, ours = timed(41.5, 82.0).latency
    never = replace(ours, variant="effopt, no exits", speedup=0.97)
    rows = (base, never, ours, *(replace(row, batch=8, speedup=1.5) for row in (base, ours)))
    assert '<p class="big">2.03×</p>' in Report(latency=rows).html()  # noqa: RUF001


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_latency_with_means_keeps_to_its_width(scale: float) -> None:
    made = timed(41.5, 82.0)
    times = ("median_ms", "p90_ms", "p99_ms", "low_ms", "high_ms", "mean_ms")
    rows = (replace(row, **{n: scale * getattr(row, n) for n in times}) for row in made.latency)
    text = replace(made, latency=tuple(rows)).text()
    assert max(map(len, text.splitlines())) <= 80
    assert "2.03x (1.98..2.11)" in text


def test_a_bar_is_the_mean_that_its_speedup_is_of() -> None:
    html = timed(41.5, 82.0).html()
    assert "effopt: 41.5 ms" in html
    assert "effopt: 31.5 ms" in timed(None, None).html()
