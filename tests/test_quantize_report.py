"""What the report says of quantized layers: in the text, on the page, and of facts that are not."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from effopt.capture import capture
from effopt.passes.quantize import Quantize
from effopt.pipeline import Pipeline, Step
from effopt.report import Report, StepRecord
from effopt.report_layers import read_layers, some
from tests.test_report import EVIL, Page

SPEC = "quantize{scheme=int4-awq}"


def layer(path: str, error: object = 0.01, **other: object) -> dict[str, object]:
    """Make a row as the pass does, for a layer of 256 inputs."""
    row = {"path": path, "shape": [512, 256], "bits": 4, "group": 128, "symmetric": True}
    return {**row, "error": error, "measured_on": "68 tokens", **other}


def group(kind: str, producers: list[str], **other: object) -> dict[str, object]:
    return {"kind": kind, "linears": ["a.q", "a.k"], "producers": producers, **other}


def report(facts: dict[str, Any], spec: str = SPEC) -> Report:
    return Report("Net", "cpu", steps=(StepRecord(spec, True, facts=facts),))


def sample(tail: str = "") -> Report:
    """Make a report of a step that fills every field, with `tail` behind every name."""
    errors = (0.001, 0.02, 0.003, 0.04, 0.005, 0.06)
    layers = [layer(f"blocks.{n}.fc{tail}", error) for n, error in enumerate(errors)]
    layers.append(layer(f"out{tail}", None, bits=8, group=256, symmetric=False))
    searched = {"ratio": 0.35, "loss": 0.25, "rtn_loss": 0.5}
    groups = [
        group("folded", [f"a.norm{tail}"], **searched),
        group("mul", [], alpha=0.5),
        group(f"odd{tail}", [], linears=[f"b{tail}"]),
    ]
    left = {f"head.{n}{tail}": f"it is a head{tail}" for n in range(3)}
    facts = {"layers": layers, "groups": groups, "float": {**left, "stem": "it is narrow"}}
    return report(facts, f"{SPEC}{tail}")


def words_of(made: Report) -> str:
    return " ".join(" ".join(Page(made.html()).words).split())


def test_the_text_counts_layers_and_names_the_worst() -> None:
    text = sample().text()
    assert text.split("Layers of")[1] == TEXT


TEXT = """\
 quantize{scheme=int4-awq}
weights                               layers   largest error
────────────────────────────────────────────────────────────
4 bits, blocks of 128                      6          0.0600
8 bits, one scale a row, asymmetric        1               -
float: it is a head                        3               -
head.*
float: it is narrow                        1               -
stem

Largest errors
layer         size         measured on     error
────────────────────────────────────────────────
out           256 -> 512   68 tokens           -
blocks.5.fc   256 -> 512   68 tokens      0.0600
blocks.3.fc   256 -> 512   68 tokens      0.0400
blocks.1.fc   256 -> 512   68 tokens      0.0200
blocks.4.fc   256 -> 512   68 tokens     0.00500
Error: what rounding the weights changes of the
outputs, as a share of their energy
"""


@pytest.mark.parametrize("tail", ["", "x" * 200, EVIL])
def test_the_text_keeps_to_its_width(tail: str) -> None:
    text = sample(tail).text()
    assert max(map(len, text.splitlines())) <= 80
    assert not [char for char in text if char != "\n" and not char.isprintable()]


def test_names_and_reasons_make_no_lines_of_their_own() -> None:
    evil = "a\nb"
    facts = {"layers": [layer(evil, measured_on=evil)], "float": {evil: evil}}
    plain = {"layers": [layer("a/nb", measured_on="a/nb")], "float": {"a/nb": "a/nb"}}
    assert len(report(facts).text().splitlines()) == len(report(plain).text().splitlines())


def test_the_page_has_every_layer_with_a_bar() -> None:
    page, words = Page(sample().html()), words_of(sample())
    assert page.elements["details"] == 3
    assert page.elements["svg"] == page.elements["rect"] == 7
    for said in (
        *("7 layers", "3 groups that share the scales of their input channels"),
        *("4 layers in float", *(f"blocks.{n}.fc" for n in range(6)), "out"),
        *("256 → 512", "4 bits, blocks of 128", "68 tokens", "0.0600"),
        *("a.norm", "folded", "ratio 0.350", "50.0 %", "multiplication", "alpha 0.500"),
        *("it is a head", "head.0", "head.2", "it is narrow", "stem"),
    ):
        assert said in words


def test_bars_are_as_long_as_their_errors() -> None:
    html = report({"layers": [layer("a", 0.02), layer("b", 0.005), layer("c", None)]}).html()
    bars = html.split("<rect ")[1:]
    assert [bar.split('width="')[1].split('"')[0] for bar in bars] == ["100", "25", "0"]


def test_errors_of_zero_have_no_bar() -> None:
    html = report({"layers": [layer("a", 0.0), layer("b", 1e-15)]}).html()
    assert html.count(">0</td>") == 3
    assert html.count(' width="0"') == 2


def test_hostile_names_add_no_element() -> None:
    plain, hostile = Page(sample().html()), Page(sample(EVIL).html())
    assert hostile.elements == plain.elements
    assert hostile.attributes == plain.attributes
    assert not {"\x1b", "\u202e"} & set(sample(EVIL).html())


@pytest.mark.parametrize("facts", [{}, {"sites": []}, {"layers": []}, {"float": {"a": "b"}}])
def test_a_step_without_layers_says_nothing_of_them(facts: dict[str, Any]) -> None:
    made = report(facts)
    assert "Largest errors" not in made.text()
    assert "Layers" not in made.text()
    assert Page(made.html()).elements["details"] == 0


HOSTILE: list[object] = [
    *(None, True, -1, 5, 10**400, 2.5, float("nan"), float("inf"), "", "x", [], {}, [[]], [{}]),
    *([None, 1], {"a": 1}, {"a": {"b": []}}, [["a"]], {"": None}),
]


@pytest.mark.parametrize("name", ["layers", "groups", "float"])
def test_facts_may_be_any_json(name: str) -> None:
    facts = {"layers": [layer("a")], "groups": [group("mul", [])], "float": {"b": "c"}}
    for given in HOSTILE:
        made = report({**facts, name: given})
        assert (name != "layers") == ("Largest errors" in made.text())
        assert Page(made.html()).elements["section"] == 1 + (name != "layers")


@pytest.mark.parametrize("name", ["error", "group", "symmetric", "measured_on"])
def test_a_layer_keeps_its_row_whatever_its_figures_are(name: str) -> None:
    for given in HOSTILE:
        made = report({"layers": [layer("sound"), {**layer("odd"), name: given}]})
        assert "odd" in made.text()
        assert max(map(len, made.text().splitlines())) <= 80
        assert "odd" in words_of(made)


@pytest.mark.parametrize("name", ["path", "shape", "bits"])
def test_what_is_no_layer_is_left_out(name: str) -> None:
    for given in (*HOSTILE, [1], [1, -2], [1, True], [1, 2, 3], [1.5, 2]):
        made = report({"layers": [layer("sound"), {**layer("odd"), name: given}]})
        sound = (name == "path" and isinstance(given, str)) or (name == "bits" and given == 5)
        assert len(read_layers(made.steps)[0].rows) == 1 + sound


@pytest.mark.parametrize("name", ["kind", "producers", "ratio", "alpha", "loss", "rtn_loss"])
def test_a_group_keeps_its_row_whatever_its_figures_are(name: str) -> None:
    sound = group("mul", ["norm"], ratio=0.1, loss=0.2, rtn_loss=0.4)
    for given in HOSTILE:
        made = report({"layers": [layer("a")], "groups": [{**sound, name: given}]})
        assert "1 groups" in words_of(made)


def test_paths_in_short() -> None:
    paths = ["b.0.q", "b.1.q", "head", "b.2.q", "stem", "c.0", "d"]
    assert some(paths) == "b.*.q, head, stem and 2 more"
    assert some(["head"]) == "head"


class Net(nn.Module):
    """A layer, an activation and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up = nn.LayerNorm(64), nn.Linear(64, 128)
        self.down, self.head = nn.Linear(128, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.down(self.up(self.norm(x)).relu()))
        return y


def test_what_the_pass_says_is_what_the_report_shows() -> None:
    """The facts of a real run, through a file: every layer has a row, and the head its reason."""
    program = capture(Net().eval(), torch.randn(2, 5, 64))
    _, (record,) = Pipeline([Step(Quantize("int8-weight", group=32))]).run(program)
    made = Report.from_json(json.loads(json.dumps(report(record.facts, record.spec).to_json())))
    (found,) = read_layers(made.steps)
    assert [(row.path, row.outputs, row.inputs) for row in found.rows] == [
        ("up", 128, 64),
        ("down", 64, 128),
    ]
    assert {row.weights for row in found.rows} == {"8 bits, blocks of 32"}
    assert [paths for _, paths in found.left] == [("head",)]
    assert all(row.error is not None and 0 < row.error < 1e-3 for row in found.rows)
    assert "8 bits, blocks of 32" in made.text()


BYTES = {"embeddings": [94_000_000, 24_000_000], "linear": [342_000_000, 48_000_000]}


def test_sizes_tell_embeddings_from_linear_layers() -> None:
    made = report({"layers": [layer("a")], "bytes": BYTES})
    rows = [line.split() for line in made.text().splitlines()]
    assert ["embeddings", "89.6", "MiB", "22.9", "MiB", "25.5", "%"] in rows
    assert ["linear", "layers", "326", "MiB", "45.8", "MiB", "14.0", "%"] in rows
    assert ["all", "416", "MiB", "68.7", "MiB", "16.5", "%"] in rows
    assert "embeddings 89.6 MiB 22.9 MiB 25.5 %" in words_of(made)


@pytest.mark.parametrize("odd", [7, {"linear": 3}, {"linear": [1]}, {"linear": [-1, "x"]}, None])
def test_sizes_that_are_none_are_left_out(odd: object) -> None:
    made = report({"layers": [layer("a")], "bytes": odd})
    assert "Sizes" not in made.text()


def test_weights_that_are_no_integers_are_called_what_they_are() -> None:
    made = report({"layers": [layer("a", weights="powers of two, stored as floats")]})
    assert "powers of two, stored as floats" in made.text()
    assert "4 bits" not in made.text()


def test_an_embedding_is_told_from_a_layer() -> None:
    table = layer("words", bits=8, group=256, kind="embedding")
    made = report({"layers": [layer("a"), table]})
    assert "embedding: 8 bits, one scale a row" in made.text()
