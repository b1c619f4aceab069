"""`effopt.explain` and `effopt inspect`: what is said of a model, in words, JSON and a picture."""

import functools
import itertools
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effopt
from effopt import explain_rows, passes
from effopt.__main__ import main
from effopt.collapse import alike, bare, braced, ranges, starred
from effopt.explanation import Explanation
from effopt.passes.merge_tokens import MergeTokens
from effopt.program import place_of, where
from effopt.rules_table import rules
from tests.programs import captured, made
from tests.spellings import WIDTH, ScaledBlock

EVIL = "</text><script>\x1b[2J"
SVG = "{http://www.w3.org/2000/svg}"


@functools.cache
def explained(name: str, *dynamic: str) -> Explanation:
    model, inputs = made(name)
    return effopt.explain(model, inputs, dynamic=dynamic or ("batch",))


class Net(nn.Module):
    """Three blocks; `read` says what becomes of the last hidden states."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.Sequential(ScaledBlock(), ScaledBlock(), ScaledBlock())
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.blocks(self.stem(x)))


def averaged(x: Tensor) -> Tensor:
    return x.mean(1)


def cumulated(x: Tensor) -> Tensor:
    return x.cumsum(1).mean(1)


@functools.cache
def of_net(read: Callable[[Tensor], Tensor] = averaged) -> Explanation:
    torch.manual_seed(0)
    return effopt.explain(Net(read).eval(), torch.randn(2, 12, WIDTH))


# --- what is found ----------------------------------------------------------------------------


def test_an_image_model() -> None:
    found = explained("vit")
    (axis,) = found.axes
    model, _ = made("vit")
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    assert [(row.name, row.shape) for row in found.inputs] == [
        ("pixel_values", ("batch", 3, 32, 32))
    ]
    assert (axis.size, axis.batch, axis.prefix, axis.suffix, axis.picks) == (
        17,
        "batch",
        1,
        0,
        (0,),
    )
    assert (axis.made_by.path, axis.made_by.operator) == ("vit.embeddings", "cat.default")
    assert (axis.causal, axis.padding, axis.emitted) == (False, False, False)
    assert {name: tried.possible for name, tried in axis.techniques.items()} == {
        "merge-tokens": True,
        "prune-tokens": True,
    }
    assert [(site.block, site.place.path) for site in axis.sites if site.usable] == [
        (n, f"vit.layers.{n}.attention") for n in range(3)
    ]
    call = found.calls[0]
    assert (call.queries, call.keys, call.heads, call.head_dim) == ("tokens", "tokens", 2, 16)
    assert (call.mask, call.cross, call.causal) == ("none", False, False)
    assert [row.block for row in found.exits] == [0, 1, 2]
    assert (found.unknown, found.refused) == ((), ())


def test_groups_are_the_layers_that_share_scales() -> None:
    group = explained("vit").groups[0]
    norm = "vit.layers.0.layernorm_before"
    assert (group.family, group.source.path) == ("norm", norm)
    assert group.linears == tuple(f"vit.layers.0.attention.{x}_proj" for x in "qkv")
    assert (group.kind, group.producers, group.pinned) == ("folded", (norm,), "")
    assert (group.channels, group.scales) == (32, 32)
    behind = next(row for row in explained("vit").groups if row.kind == "mul")
    assert behind.linears == ("vit.layers.0.mlp.fc2",)
    assert (behind.producers, behind.pinned.split()[0]) == ((), "gelu")
    read = [linear for row in explained("vit").groups for linear in row.linears]
    assert len(read) == 3 * 6 + 1


class Grouped(nn.Module):
    """Two query heads share a head of values, and the last layer's weight is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.o, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)
        k, v = self.kv(x).unsqueeze(1).chunk(2, -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        y = self.o(y.transpose(1, 2).flatten(2))
        return self.last(self.last(y).tanh())


@functools.cache
def of_grouped() -> Explanation:
    return effopt.explain(Grouped().eval(), torch.randn(2, 12, WIDTH))


def test_groups_of_every_kind() -> None:
    groups = {row.linears: row for row in of_grouped().groups}
    assert {row.kind for row in groups.values()} == {"mul", "tied", "none"}
    tied = groups["o",]
    assert (tied.kind, tied.producers) == ("tied", ("kv",))
    assert (tied.channels, tied.scales) == (WIDTH, WIDTH // 2)
    assert groups["q", "kv"].pinned == "it is an input"
    assert [row.linears for row in of_grouped().groups if row.kind == "none"] == [("last",)] * 2


def test_the_text_says_who_takes_the_scales_up() -> None:
    text = of_grouped().text()
    for words in (
        "in all         1 by a multiplication, 1 folded and tied, 2 without scales",
        "by a multiplication: it is an input",
        "8 scales for 16 channels, folded into kv",
        "without scales: a weight is computed, or read elsewhere too",
    ):
        assert words in text


def test_groups_of_blocks_alike_are_one_row() -> None:
    text = explained("vit").text()
    assert "3 x            vit.layers.*.attention.{q_proj, k_proj, v_proj}" in text
    assert "vit.layers.0.mlp.activation_fn, and 2 more alike" in " ".join(text.split())
    assert "layers.1" not in text


def test_padding_and_a_free_length() -> None:
    (axis,) = explained("bert", "batch", "length").axes
    assert (axis.size, axis.batch, axis.padding) == ("length", "batch", True)
    assert axis.techniques["merge-tokens"].possible
    refusal = axis.techniques["prune-tokens"].refusal
    assert refusal is not None
    assert "dynamic" in refusal.reason
    assert {row.mask for row in explained("bert").calls} == {"padding"}


def test_two_towers_and_cross_attention() -> None:
    torch.manual_seed(0)
    layers = {"d_model": WIDTH, "nhead": 2, "dim_feedforward": 24, "dropout": 0.0}
    model = nn.Transformer(
        num_encoder_layers=2, num_decoder_layers=1, batch_first=True, **layers
    ).eval()
    given = (torch.randn(2, 12, WIDTH), torch.randn(2, 7, WIDTH))
    found = effopt.explain(model, given)
    assert [(axis.name, axis.size) for axis in found.axes] == [
        ("encoder.tokens", 12),
        ("decoder.tokens", 7),
    ]
    cross = found.calls[-1]
    assert (cross.queries, cross.keys, cross.cross) == ("decoder.tokens", "encoder.tokens", True)
    assert "decoder.tokens to encoder.tokens" in found.text()


@pytest.mark.parametrize("name", ["vit", "bert", "bert_tokens", "encoder", "encoder_padded"])
def test_masks_are_told_apart(name: str) -> None:
    words = {word for row in explained(name).calls for word in row.mask.split("+")}
    assert words <= {"none", "padding", "causal", "pairs", "bias"}
    assert ("padding" in words) == any(axis.padding for axis in explained(name).axes)


def test_causal_attention_is_told() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = ScaledBlock()

        def forward(self, x: Tensor) -> Tensor:
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            return self.block(x, seen)[:, -1]

    found = effopt.explain(Causal().eval(), torch.randn(2, 12, WIDTH))
    assert [row.mask for row in found.calls] == ["causal"]
    assert found.axes[0].causal
    assert not found.axes[0].techniques["merge-tokens"].possible


# --- what is refused --------------------------------------------------------------------------


def test_a_refusal_names_node_module_line_reason_and_remedy() -> None:
    axis = of_net(cumulated).axes[0]
    refused = [site for site in axis.sites if not site.usable]
    assert refused
    for site in refused:
        assert site.refusal is not None
        place = site.refusal.place
        assert (place.node, place.operator) == ("cumsum", "cumsum.default")
        assert re.fullmatch(r".*test_inspect\.py:\d+", place.source)
        assert site.refusal.reason == "it depends on the order of the tokens"
        assert site.refusal.remedy


def test_a_pass_that_crashes_is_told_and_the_rest_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def crash(self: MergeTokens, program: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(MergeTokens, "check", crash)
    net = Net(averaged).eval()
    found = effopt.explain(net, torch.randn(2, 12, WIDTH))
    refusal = found.axes[0].techniques["merge-tokens"].refusal
    assert refusal is not None
    assert refusal.reason == "merge-tokens failed: ZeroDivisionError: oh"


def test_an_analysis_that_crashes_leaves_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(program: object) -> None:
        raise AssertionError

    monkeypatch.setattr(explain_rows, "find_cuts", crash)
    found = effopt.explain(Net(averaged).eval(), torch.randn(2, 12, WIDTH))
    assert found.exits == ()
    assert [refusal.reason for refusal in found.refused] == ["exits failed: AssertionError"]
    assert "exits failed" in found.text()
    assert "exits failed" in found.svg()


def test_probes_are_passes_of_the_table() -> None:
    assert set(passes.PROBES) <= set(passes.TABLE)


def test_a_model_without_attention() -> None:
    found = effopt.explain(nn.Linear(3, 2), torch.randn(2, 3))
    assert (found.axes, found.calls, found.exits) == ((), (), ())
    assert "There is no attention" in found.text()
    assert "No attention call is known." in found.svg()


# --- text -------------------------------------------------------------------------------------


def test_the_text() -> None:
    shown = re.sub(r", \w+\.py:\d+", ", file.py", of_net(cumulated).text())
    assert shown == GOLDEN


GOLDEN = """\
Net
  6.25 k parameters, 61 operators
  input x [batch, 12, 16] float32

tokens: 12 tokens
  made by        x (placeholder)
  protected      none
  outputs        an average over the tokens
  attention      every token sees all, no padding mask
  merge-tokens   possible
  prune-tokens   possible
  sites          blocks 0-1: tokens may leave
                 block 2: no, see 1

Attention calls
  blocks 0-2     blocks.*.attn
                 tokens, 2 heads of 8, no mask

Exits: behind these blocks, one value carries everything
  blocks 0-2     blocks.* (add.Tensor)
                 36 %, 68 %, 100 % of the work is done by then

Groups: layers that share scales of their inputs
  in all         4 by a multiplication, 9 folded
  1 x            stem
                 read placeholder x
                 by a multiplication: it is an input
  3 x            blocks.*.attn.qkv
                 read norm blocks.*.norm1
                 folded into blocks.*.norm1
  3 x            blocks.*.attn.proj
                 read view blocks.*.attn
                 folded into blocks.*.attn.qkv
  3 x            blocks.*.mlp.0
                 read norm blocks.*.norm2
                 folded into blocks.*.norm2
  3 x            blocks.*.mlp.2
                 read pointwise blocks.*.mlp.1
                 by a multiplication: gelu (gelu.default) in blocks.0.mlp.1, and
                 2 more alike

Refusals
  1  it depends on the order of the tokens
     at  cumsum (cumsum.default), file.py
     do  leave this block out (options first, last or sites), or keep the model
         as it is
"""


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_text_keeps_to_the_width(width: int) -> None:
    for found in (explained("bert"), of_net(cumulated), renamed(of_net(), "x" * 300)):
        assert max(map(len, found.text(width).splitlines())) <= width


def renamed(found: Explanation, name: str) -> Explanation:
    return replace(found, model=name)


def test_the_record_is_json_with_its_keys() -> None:
    record = json.loads(json.dumps(explained("vit").to_json()))
    assert list(record) == [
        *("model", "parameters", "operators", "attention", "inputs", "axes", "calls", "exits"),
        *("groups", "unknown", "refused"),
    ]
    assert record["attention"] == 3
    site = record["axes"][0]["sites"][0]
    assert list(site) == ["block", "place", "usable", "refusal"]
    assert list(site["place"]) == ["node", "operator", "path", "source"]


def test_places_are_read_back_as_they_were_written() -> None:
    for node in captured("bert").nodes():
        place = place_of(where(node))
        operator = f" ({place.operator})"
        path = f" in {place.path}" if place.path else ""
        source = f" at {place.source}" if place.source else ""
        assert place.node == node.name
        assert f"{place.node}{operator}{path}{source}" == where(node)
    assert place_of("model").node == "model"
    assert place_of("something that is no place").node == "something that is no place"


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([], ""), ([3], "3"), ([0, 1, 2, 3], "0-3"), ([0, 2, 4, 5, 9], "0, 2, 4-5, 9")],
)
def test_ranges(numbers: list[int], words: str) -> None:
    assert ranges(numbers) == words


def test_paths_that_differ_in_numbers_are_one() -> None:
    assert starred(["vit.layers.0.attn", "vit.layers.1.attn"]) == "vit.layers.*.attn"
    assert starred(["layers.0.blocks.1", "layers.1.blocks.1"]) == "layers.*.blocks.1"
    assert starred(["a.0", "a"]) == "a.0"
    assert bare("layers.10.fc2.0") == "layers.*.fc2.*"


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["a.q", "a.k"], "a.{q, k}"),
        (["a.q.dense", "a.k.dense"], "a.{q, k}.dense"),
        (["a.proj", "a.proj"], "a.proj"),
        (["proj", "attn.qkv"], "{proj, attn.qkv}"),
        (["a", "a.b"], "a.{, b}"),
        (["head"], "head"),
    ],
)
def test_paths_in_braces(paths: list[str], words: str) -> None:
    assert braced(paths) == words


def test_rows_of_one_key_are_gathered_in_order() -> None:
    assert alike([3, 1, 5, 2], lambda n: n % 2) == [(1, [3, 1, 5]), (0, [2])]


# --- picture ----------------------------------------------------------------------------------


def drawn(found: Explanation) -> ET.Element:
    return ET.fromstring(found.svg())


def marks(picture: ET.Element, kind: str) -> int:
    return sum(kind in (element.get("class") or "").split() for element in picture.iter())


@pytest.mark.parametrize("name", ["vit", "bert", "net"])
def test_the_picture_marks_every_site_and_exit(name: str) -> None:
    found = of_net(cumulated) if name == "net" else explained(name)
    sites = [site.usable for axis in found.axes for site in axis.sites]
    legend = 1
    picture = drawn(found)
    assert marks(picture, "site") == sum(sites) + legend
    assert marks(picture, "refused") == len(sites) - sum(sites) + legend
    assert marks(picture, "exit") == len(found.exits) + legend
    assert marks(picture, "box") == len(found.calls) + legend


@pytest.mark.parametrize("copies", [1, 2, 3, 5])
def test_nothing_in_the_picture_overlaps(copies: int) -> None:
    """Lines of text at one height end before the next begins, by the width of a wide font."""
    found = of_net(cumulated)
    axes = tuple(replace(found.axes[0], name=f"{'tower' * 9}.{n}") for n in range(copies))
    calls = tuple(
        replace(call, queries=axis.name, place=replace(call.place, path="encoder.layer" * 20))
        for axis in axes
        for call in found.calls
    )
    picture = drawn(replace(found, axes=axes, calls=calls))
    edge = float(str(picture.get("width")))
    rows: dict[float, list[tuple[float, float]]] = {}
    for text in picture.iter(f"{SVG}text"):
        wide = len(text.text or "") * (10.0 if text.get("class") == "lane" else 6.9)
        x = float(str(text.get("x")))
        left = x - {"end": wide, "middle": wide / 2}.get(str(text.get("text-anchor")), 0.0)
        rows.setdefault(float(str(text.get("y"))), []).append((left, left + wide))
    for spans in rows.values():
        ordered = sorted(spans)
        assert all(a[1] <= b[0] + 1 for a, b in itertools.pairwise(ordered))
        assert ordered[-1][1] <= edge


def test_names_from_the_model_cannot_leave_the_picture() -> None:
    picture = drawn(renamed(of_net(), EVIL))
    assert not list(picture.iter("script"))
    assert "\\x1b" in ET.tostring(picture, "unicode")


# --- the command ------------------------------------------------------------------------------


def test_the_rules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--rules"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert main(["inspect", "--rules", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["rules"]
    assert [row["family"] for row in listed] == [row.family for row in rules()]
    assert all(row["family"] in text and row["operators"] and row["effect"] for row in listed)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no MODEL was given"),
        (("--rules", "shop:make"), "--rules takes no MODEL"),
        (("shop:make", "--svg", "vit.png"), "ends with .svg"),
        (("shop:make", "--svg", "nowhere/vit.svg"), "cannot be written"),
    ],
)
def test_wrong_usage_is_told_at_once(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_command_writes_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inspect_shop.py").write_text(
        "from tests import zoo\ndef make(): return zoo.make('encoder')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "inspect_shop:make", "--svg", "net.svg"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Encoder\n")
    assert out.endswith("written: net.svg\n")
    assert "attention calls" in err
    document: Any = ET.parse(tmp_path / "net.svg").getroot()
    assert document.tag == f"{SVG}svg"
