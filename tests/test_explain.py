"""`effopt.explain`: what is found in a model, and what is refused, where and why."""

import re

import pytest
import torch
from torch import Tensor, nn

import effopt
from effopt import explain_rows, passes
from effopt.passes.merge_tokens import MergeTokens
from tests.explained import Net, averaged, cumulated, explained, of_net
from tests.programs import made
from tests.spellings import WIDTH, ScaledBlock


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
        assert re.fullmatch(r".*explained\.py:\d+", place.source)
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
