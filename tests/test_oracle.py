"""The oracle itself: right programs pass, and each sabotage of a right program is seen."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.fx import Graph, Node

from effopt.attention import SDPA
from tests.fuzz.judge import judge
from tests.fuzz.model import draw, make
from tests.fuzz.spec import Spec
from tests.oracle import Case, faults, make_case
from tests.oracle.case import captured
from tests.oracle.checks import CHECKS
from tests.oracle.decisions import GATHER, SCATTER
from tests.thin import thin

aten = torch.ops.aten
MERGED = torch.ops.effopt.merge_tokens.default
MERGE, PRUNE = "merge-tokens{r=3,sites=[0]}", "prune-tokens{keep=0.5,sites=[0]}"


def case(spec: Spec, passes: str) -> Case:
    names = ("batch", "length") if spec.free_length else ("batch",)
    original, normal = captured(make(spec), draw(spec, 2), names)
    return make_case(original, normal, passes, lambda batch, length: draw(spec, batch, length))


def _forget_sizes(graph: Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=SDPA):
        node.args = node.args[:3]


def _forget_weights(graph: Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
        node.args = (node.args[0], 6)


def _turn_positions(graph: Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=GATHER):
        table, index, dim = node.args
        if isinstance(table, Node) and table.op == "get_attr":
            with graph.inserting_before(node):
                turned = graph.call_function(aten.flip.default, (index, [1]))
            node.args = (table, turned, dim)


def _pick_another(graph: Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten.select.int):
        if node.args[1:] == (1, 0):
            node.args = (node.args[0], 1, 1)


def _restore_zeros(graph: Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=SCATTER):
        with graph.inserting_before(node):
            zeros = graph.call_function(aten.zeros_like.default, (node.args[0],))
        node.args = (zeros, *node.args[1:])


def _mix_samples(graph: Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=GATHER):
        with graph.inserting_before(node):
            turned = graph.call_function(aten.flip.default, (node.args[1], [0]))
        node.args = (node.args[0], turned, *node.args[2:])


def _weigh_by_place(graph: Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=MERGED):
        stream = node.args[0]
        assert isinstance(stream, Node)
        with graph.inserting_before(node):
            places = graph.call_function(aten.arange.default, (stream.meta["val"].shape[1],))
            column = graph.call_function(aten.unsqueeze.default, (places, 1))
            weighed = graph.call_function(aten.mul.Tensor, (stream, column))
        node.args = (weighed, *node.args[1:])


def _return_doubles(graph: Graph) -> None:
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        wide = [graph.call_function(aten.to.dtype, (n, torch.float64)) for n in output.args[0]]
    for made, before in zip(wide, output.args[0], strict=True):
        made.meta = dict(before.meta)
    output.args = (tuple(wide),)


SABOTAGE: dict[str, tuple[Spec, str, Callable[[Graph], None], str]] = {
    "sizes": (Spec(out="tokens"), MERGE, _forget_sizes, "emulation"),
    "mean": (Spec(out="mean"), MERGE, _forget_weights, "emulation"),
    "rotary": (Spec(position="rotary", out="mean"), MERGE, _turn_positions, "emulation"),
    "bias": (Spec(mask="relative", out="mean"), PRUNE, _turn_positions, "emulation"),
    "pick": (Spec(front=1, out="cls"), PRUNE, _pick_another, "emulation"),
    "restore": (Spec(out="tokens"), PRUNE, _restore_zeros, "emulation"),
    "samples": (Spec(out="mean"), PRUNE, _mix_samples, "batch independence"),
    "dtype": (Spec(out="tokens"), PRUNE, _return_doubles, "free sizes"),
    "order": (Spec(out="mean"), MERGE, _weigh_by_place, "permutation"),
    "pads": (
        Spec(source="text", mask="bool", free_length=True, out="cls"),
        "merge-tokens{r=1,sites=[0]}",
        _forget_sizes,
        "padding",
    ),
}
"""A model, a pass, what is done to the reduced graph, and the check that must see it."""


@pytest.mark.parametrize("name", thin(SABOTAGE))
def test_right_programs_pass(name: str) -> None:
    spec, passes, _, _ = SABOTAGE[name]
    assert judge(spec, (passes,)).right == ["normal form", passes]


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_sabotage_is_seen(name: str) -> None:
    spec, passes, sabotage, check = SABOTAGE[name]
    made = case(spec, passes)
    broken = replace(made, reduced=made.reduced.fork())
    sabotage(broken.reduced.module.graph)
    broken.reduced.module.recompile()
    assert any(fault.startswith(check) for fault in faults(broken))


def test_identity_sees_a_normal_form_that_is_another_model() -> None:
    made = case(Spec(out="mean"), MERGE)
    broken = replace(made, normal=made.normal.fork())
    for node in broken.normal.module.graph.find_nodes(op="call_function", target=aten.gelu.default):
        node.target = aten.relu.default
    broken.normal.module.recompile()
    assert any(fault.startswith("identity") for fault in faults(broken))


def test_every_check_is_shown_to_fail() -> None:
    assert {row[3] for row in SABOTAGE.values()} | {"duplicates", "identity"} == set(CHECKS)


def test_duplicates_see_sizes_that_were_forgotten() -> None:
    made = case(Spec(out="mean"), MERGE)
    _forget_sizes(made.reduced.module.graph)
    made.reduced.module.recompile()
    assert any(fault.startswith("duplicates") for fault in faults(made))


FOUND: dict[str, tuple[Spec, str]] = {
    "a mask read by blocks and by the head has a form for each": (
        Spec(source="text", tokens=6, zero="each", out="masked_max"),
        "merge-tokens{r=2,sites=[0]}",
    ),
    "one token that is left": (
        Spec(source="vision", grid=(2, 2), call="mha", tower="same", axis=1),
        "prune-tokens{keep=0.3,schedule=linear}",
    ),
    "padding forced into real tokens beside a relative bias": (
        Spec(mask="relative_padded", out="several"),
        "merge-tokens{r=0.49,last=-2}",
    ),
    "one word twice, at two late positions: keys that are the same of tokens that are not": (
        Spec(seed=999, source="text", position="late", order="parallel", out="mean"),
        "merge-tokens{r=2,sites=[0]}",
    ),
    "tokens that come back in another order of dims than that of the first site": (
        Spec(depth=3, hostile=((1, "conv"),), tokens_first=True),
        "merge-tokens{r=0.49,proportional=false},prune-tokens{keep=0.7}",
    ),
}
"""What campaigns found, in the core or in the oracle."""


@pytest.mark.parametrize("name", thin(FOUND))
def test_what_campaigns_found_stays_right(name: str) -> None:
    spec, passes = FOUND[name]
    assert judge(spec, (passes,)).right == ["normal form", passes]


def test_tokens_are_not_given_back_across_late_positions() -> None:
    passes = "prune-tokens{keep=0.7,sites=[0,1,2]}"
    verdict = judge(Spec(depth=3, position="late", out="masked_mean"), (passes,))
    assert not verdict.faults
    assert "all tokens are needed" in verdict.refusals[passes]
