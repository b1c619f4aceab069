"""Embedding tables on 8 bits: what a lookup yields, what stays in float, and sizes in the facts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import effopt
from effopt.capture import capture
from effopt.passes.rounding import Grid, round_weight
from effopt.pipeline import Pipeline
from effopt.program import Program
from effopt.recipe import steps_of
from effopt.report import StepRecord
from effopt.target import target

WORDS, WIDTH = 100, 64


class Words(nn.Module):
    """Words and kinds of words, a layer, and a head, which may be tied to the words."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.kinds = nn.Embedding(WORDS, WIDTH), nn.Embedding(2, WIDTH)
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.kinds(ids % 2)
        return self.head(x + self.layer(x).relu())


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, WORDS, (2, 9), generator=torch.Generator().manual_seed(seed))


def quantized(net: nn.Module, spec: str) -> tuple[Program, StepRecord]:
    made = replace(capture(net.eval(), ids()), target=target("cpu"))
    after, records = Pipeline(steps_of(spec)).run(made)
    return after, records[-1]


SPEC = "quantize{scheme=int8-weight,embeddings=true}"


def test_a_lookup_yields_the_rounded_row() -> None:
    net = Words()
    made, record = quantized(net, SPEC)
    with torch.no_grad():  # the model on rounded weights
        for weight, group in ((net.words.weight, 0), (net.layer.weight, 64)):
            weight.copy_(round_weight(weight, Grid(8, group, symmetric=True)).dequantized())
        want = net(ids(1))
    # The same sums in the same order but for the product of code and scale: 2e-7 was measured.
    torch.testing.assert_close(made.run((ids(1),))[0], want, rtol=0, atol=1e-5)
    assert record.notes[-1] == "1 tables of embeddings on 8 bits"
    (row,) = [row for row in record.facts["layers"] if row.get("kind") == "embedding"]
    assert (row["path"], row["shape"], row["bits"]) == ("words", [WORDS, WIDTH], 8)
    # Gaussian rows on 8 bits: a step is about 2 * 2.4 sigma / 254, its error step^2 / 12.
    assert 1e-5 < row["error"] < 1e-4


def test_small_tables_and_tied_ones_stay_with_the_reason() -> None:
    _, record = quantized(Words(tied=True), SPEC)
    left = record.facts["float"]
    assert left["words"] == "its table is also read by head"
    assert "fewer than 64 rows" in left["kinds"]


def test_tables_stay_unless_they_are_asked_for() -> None:
    made, record = quantized(Words(), "quantize{scheme=int8-weight}")
    assert all("kind" not in row for row in record.facts["layers"])
    assert torch.ops.aten.embedding.default in {node.target for node in made.nodes()}


@pytest.mark.parametrize(("scheme", "bits"), [("int8-weight", 8), ("int4-rtn", 4)])
def test_bytes_are_told_apart_by_what_reads_them(scheme: str, bits: int) -> None:
    _, record = quantized(Words(), f"quantize{{scheme={scheme},embeddings=true,symmetric=true}}")
    sizes = record.facts["bytes"]
    kinds = 2 * WIDTH * 4
    assert sizes["embeddings"] == [WORDS * WIDTH * 4 + kinds, WORDS * (WIDTH + 4) + kinds]
    head, bias = WORDS * WIDTH * 4, WIDTH * 4
    before = WIDTH * WIDTH * 4 + bias + head
    assert sizes["linear"] == [before, WIDTH * WIDTH * bits // 8 + WIDTH * 4 + bias + head]
    assert sizes["other"] == [0, 0]


@pytest.mark.slow
def test_the_file_holds_the_codes(tmp_path: Path) -> None:
    sizes = []
    for name in ("quantize{scheme=int8-weight}", SPEC):
        made = effopt.optimize(Words(), ids(), recipe=name)
        made.save(tmp_path / str(len(sizes)))
        sizes.append((tmp_path / str(len(sizes)) / "model.onnx").stat().st_size)
    saved = WORDS * WIDTH * 3 - WORDS * 4
    assert sizes[0] - sizes[1] == pytest.approx(saved, abs=1000)  # a few nodes are written more
