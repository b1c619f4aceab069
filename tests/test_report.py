"""The report says the same as JSON, as text and as a page, and no name in it can break out."""

import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from effopt.errors import UnsafeFileError
from effopt.plain import bytes_text, change_text, clean, count_text, figure, shorten
from effopt.report import Latency, Quality, Report, Stage, StepRecord

EVIL = "</script><img src=x onerror=alert(1)>\x1b[2J[red]\"'&\u202e"


def sample(tail: str = "") -> Report:
    """Make a report that fills every field, with `tail` after every name."""
    counts = [197, 184, 171, 158]
    sites = [
        {"path": f"vit.layers.{n}{tail}", "before": counts[n], "after": counts[n + 1]}
        for n in range(3)
    ]
    exact, ours = f"exact export{tail}", f"this engine{tail}"
    return Report(
        model=f"ViTForImageClassification{tail}",
        target=f"cpu{tail}",
        recipe=f"merge-tokens{{r=13}}{tail}",
        version=f"0.1.0{tail}",
        environment={f"cpu{tail}": f"a processor{tail}", "threads": 2},
        stages=(Stage(f"capture{tail}", 4.25), Stage("build", 2.0)),
        steps=(
            StepRecord(f"merge-tokens{{r=13}}{tail}", True, "", (f"3 sites{tail}",), 512, 640, 1.5,
                       {"tokens": 197, "sites": sites}),
            StepRecord("fold-scales", False),
            StepRecord("quantize", False, f"no int8 for linear_7{tail}"),
        ),
        macs_before=4_599_000_000,
        macs_after=2_703_000_000,
        weight_bytes=88_200_000,
        peak_rss_mb=1423.4,
        files={f"model.onnx{tail}": 88_400_000},
        quality=(Quality(f"top-1 agreement{tail}", 0.9766, 0.945, 0.99, 256, f"noise{tail}"),),
        latency=(
            Latency(exact, 1, 84.0, 92.4, 109.2, 81.5, 88.2, 120, 2, 8),
            Latency(ours, 1, 51.5, 56.7, 64.4, 49.5, 53.6, 180, 2, 8, 1.63, 1.58, 1.71, exact),
        ),
        pending=f"engine: to be built on sm_80{tail}",
        notes=(f"measured on noise{tail}",),
    )  # fmt: skip


class Page(HTMLParser):
    """Counts the elements, collects the text and the attributes that could run or fetch."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_json_comes_back_the_same() -> None:
    report = sample(EVIL)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert Report.from_json(json.loads(text)) == report


def test_a_figure_that_is_no_number_is_none_in_json() -> None:
    report = replace(sample(), quality=(Quality("cosine", float("nan"), float("inf")),))
    record = report.to_json()["quality"][0]
    assert (record["value"], record["low"]) == (None, None)
    assert Report.from_json(report.to_json()).quality[0].value is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "report has no field 'surprise'"),
        ({"macs_before": "many"}, "report.macs_before is 'many'"),
        ({"macs_before": True}, "report.macs_before is True"),
        ({"stages": [{"name": "x"}]}, "missing 1 required positional argument: 'seconds'"),
        ({"stages": {"name": "x"}}, "report.stages is {'name': 'x'}"),
        ({"files": {"a": "b"}}, "report.files.a is 'b'"),
        ({"quality": [{"metric": "m", "value": "high"}]}, "report.quality[0].value is 'high'"),
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UnsafeFileError) as caught:
        Report.from_json({**sample().to_json(), **change})
    assert message in str(caught.value)


def test_text_says_it_in_80_columns() -> None:
    text = sample().text()
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "ViTForImageClassification for cpu",
        "4.60 GMACs -> 2.70 GMACs a sample (-41 %)",
        "1.63x (1.58..1.71)",
        "0.94500..0.99000",
        "skipped: no int8 for linear_7",
        "nothing to do",
        "pending: engine: to be built on sm_80",
        "120 to 180 calls each, interleaved, 2 thread(s)",
    ):
        assert words in text


def test_text_has_no_control_character_and_reads_no_markup() -> None:
    text = sample(EVIL).text(200)
    assert not [char for char in text if char != "\n" and not char.isprintable()]
    assert "\\x1b[2J[red]" in text


def test_an_empty_report_is_still_a_report() -> None:
    assert "model for" in Report().text()
    assert Page(Report().html()).elements["section"] == 0


def test_page_has_the_pictures_and_the_policy() -> None:
    html = sample().html()
    page = Page(html)
    assert page.elements["svg"] == 3
    assert "default-src &#x27;none&#x27;; style-src &#x27;unsafe-inline&#x27;" in html
    words = " ".join(page.words)
    for text in ("1.63×", "197", "184", "no int8 for linear_7", "exact export"):  # noqa: RUF001
        assert text in words


def test_page_loads_and_runs_nothing() -> None:
    html = sample(EVIL).html()
    page = Page(html)
    assert page.elements["script"] == 1
    assert not page.attributes & {"src", "href", "onerror", "onload", "action", "data"}
    assert "url(" not in html
    assert "@import" not in html


def test_hostile_names_add_no_element() -> None:
    plain, hostile = Page(sample().html()), Page(sample(EVIL).html())
    assert hostile.elements == plain.elements
    assert hostile.attributes == plain.attributes
    assert "\x1b" not in sample(EVIL).html()
    assert "\u202e" not in sample(EVIL).html()


def test_island_is_the_report() -> None:
    html = sample(EVIL).html()
    inside = html.split('id="report">')[1].split("</script>")[0]
    assert "<" not in inside
    assert Report.from_json(json.loads(inside)) == sample(EVIL)


def test_tokens_are_labelled_by_what_tells_the_blocks_apart() -> None:
    sites = [{"path": f"vit.layer.{n}.attention", "before": 9, "after": 8} for n in range(2)]
    step = StepRecord("merge", True, facts={"sites": sites})
    html = Report(steps=(step,)).html()
    assert ">0</text>" in html
    assert ">1</text>" in html


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (figure(0.0), "0"),
        (figure(1234.5), "1234"),
        (figure(12.345), "12.3"),
        (figure(0.00123), "0.00123"),
        (figure(None), "-"),
        (figure(float("nan")), "-"),
        (bytes_text(0), "0 B"),
        (bytes_text(1023), "1023 B"),
        (bytes_text(1536), "1.50 KiB"),
        (bytes_text(3 * 2**30), "3.00 GiB"),
        (count_text(4.599e9, "MACs"), "4.60 GMACs"),
        (count_text(12, "MACs"), "12.0 MACs"),
        (change_text(100, 59), "-41 %"),
        (change_text(0, 5), ""),
        (change_text(100, 100), "unchanged"),
        (shorten("abcdefghij", 5), "ab…ij"),
        (clean("a\nb\x1b\x9b"), "a\\nb\\x1b\\u009b"),
    ],
)
def test_figures_and_words(got: str, wanted: str) -> None:
    assert got == wanted


@pytest.mark.parametrize(
    "sites",
    [
        5,
        [5, {}],
        [{"path": "x"}],
        [{"path": "x", "before": 0, "after": 0}],
        [{"path": "x", "before": "9", "after": 8}],
    ],
)
def test_facts_that_are_no_sites_give_no_picture(sites: object) -> None:
    step = StepRecord("merge", True, facts={"sites": sites})
    assert Page(Report(steps=(step,)).html()).elements["svg"] == 0
