"""The roofline: least times by hand on one layer, and what a report says of them."""

import pytest
import torch
from torch import Tensor, nn

import effopt
from effopt.program import Program
from effopt.report import Report
from effopt.roofline import estimates, least_ms
from effopt.target import target
from tests import zoo


class Layer(nn.Module):
    """One product, of 256 inputs and 512 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def program(recipe: str = "exact", kind: torch.dtype = torch.float32) -> Program:
    model = Layer().eval().to(kind)
    return effopt.optimize(model, torch.randn(2, 4, 256, dtype=kind), recipe=recipe).program


def test_a_small_product_takes_the_time_of_its_bytes() -> None:
    """Batch 1: 4 rows; 4 B a number, at 2,039 GB/s: weights, inputs and outputs."""
    moved = 4 * (256 * 512 + 4 * 256 + 4 * 512)
    found = least_ms(program(), target("a100"), {"batch": 1})
    assert found == pytest.approx(1e3 * moved / 2039e9)


def test_a_large_product_takes_the_time_of_its_operations() -> None:
    rows = 4 * 100_000
    found = least_ms(program(), target("a100"), {"batch": 100_000})
    by_bytes = 4 * (256 * 512 + rows * (256 + 512)) / 2039e9
    by_operations = 2 * rows * 256 * 512 / 19.5e12
    assert found == pytest.approx(1e3 * max(by_bytes, by_operations))
    half = least_ms(program(kind=torch.float16), target("a100"), {"batch": 100_000})
    assert half is not None
    assert half < found


def test_another_spelling_of_attention_is_no_gain() -> None:
    """Logits that one graph writes out and another fuses cost neither: 2.6 was told as a gain."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2)).softmax(-1) @ x

    made = effopt.optimize(
        Attention().eval(), torch.randn(2, 256, 64).half(), target="h100", recipe="exact"
    )
    assert all(row.before_ms == row.after_ms for row in made.report.estimates)


def test_four_bit_weights_move_half_a_byte_each() -> None:
    recipe = "quantize{scheme=int4-rtn,group=128,heads=true,symmetric=true}"
    found = least_ms(program(recipe, torch.float16), target("a100"), {"batch": 1})
    scales = 4 * 512 * 2
    moved = 256 * 512 // 2 + scales + 2 * (4 * 256 + 4 * 512)
    assert found == pytest.approx(1e3 * moved / 2039e9)


@pytest.mark.parametrize("name", ["cpu", "orin"])
def test_no_figures_no_estimate(name: str) -> None:
    made = program()
    assert least_ms(made, target(name), {}) is None
    assert estimates(made, made, target(name)) == ()


def test_the_report_says_that_it_is_an_estimate() -> None:
    model, inputs = zoo.make("vit")
    report = effopt.optimize(model, inputs, target="a100", recipe="merge-tokens{r=3}").report
    assert [row.batch for row in report.estimates] == [1, 8]
    first, later = report.estimates
    assert 0 < first.after_ms == first.before_ms, "one sample takes the time of the weights"
    assert 0 < later.after_ms < later.before_ms
    assert report.text().count("roofline: an estimate, not measured") == 2
    assert "a roofline, not measured" in report.html()
    assert Report.from_json(report.to_json()) == report


def test_a_model_of_one_batch_size_has_one_estimate() -> None:
    model, inputs = zoo.make("vit")
    made = effopt.optimize(model, inputs, target="a100", recipe="exact", dynamic=())
    assert [row.batch for row in made.report.estimates] == [0]
    assert "a call (roofline" in made.report.text()
