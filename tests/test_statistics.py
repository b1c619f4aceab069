"""Statistics of a running program: against the model itself, without padding, in little memory."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from effopt import statistics
from effopt.calibration import read_calibration
from effopt.capture import capture
from effopt.collectors import ChannelExtremes, Collector, Gram, Histogram, MeanAbs, Rows
from effopt.errors import PreconditionError, UsageError
from effopt.program import Program, shape
from effopt.statistics import NO_MASK, NO_TOKENS, Real, Seen, find_real, gather
from tests import programs
from tests.calibration_data import Batch


def calibrated(name: str, *batches: Batch) -> Program:
    program = programs.normal(name).fork()
    program.calibration = read_calibration(batches, program)
    return program


def linear_inputs(program: Program) -> list[Node]:
    linear = torch.ops.aten.linear.default
    found = [n.args[0] for n in program.nodes() if n.target is linear]
    return [node for node in dict.fromkeys(found) if isinstance(node, Node)]


def hooked(model: nn.Module, given: Batch) -> list[np.ndarray[Any, Any]]:
    """Run the model itself; return what each of its linear layers reads, once for each value."""
    seen: dict[int, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.setdefault(id(args[0]), args[0]))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return [values.double().numpy() for values in seen.values()]


def test_statistics_are_those_of_the_model_without_padding() -> None:
    """BERT, one padded batch: what each linear layer reads, against hooks on the model itself."""
    given = programs.draw("bert", 3)
    program = calibrated("bert", given)
    nodes = linear_inputs(program)
    wanted: dict[Node, list[Any]] = {
        node: [MeanAbs(), ChannelExtremes(), Gram(), Histogram()] for node in nodes
    }
    notes = gather(program, wanted)
    real = given["attention_mask"].bool().numpy()
    reference = hooked(programs.made("bert")[0], given)
    assert len(reference) == len(nodes) == 3 * 4 + 2  # each block; the pooler, the classifier
    for node, values in zip(nodes, reference, strict=True):
        tokens = values[real] if values.ndim == 3 and values.shape[1] == 16 else values
        rows = tokens.reshape(-1, values.shape[-1])
        mean, extremes, gram, histogram = wanted[node]
        # The two graphs round differently, about 1e-6 of activations that are near 1.
        assert np.allclose(mean.mean, np.abs(rows).mean(0), rtol=1e-4, atol=1e-5)
        assert np.allclose(extremes.max_abs, np.abs(rows).max(0), rtol=1e-4, atol=1e-5)
        assert np.allclose(gram.total, rows.T @ rows, rtol=1e-4, atol=1e-3)
        assert histogram.extremes.count == rows.size
        padded = values.ndim == 3 and values.shape[1] == 16
        dropped = int((~real).sum()) if padded else 0
        how = "excluded" if padded else NO_TOKENS
        assert notes[node] == Seen(3, len(rows), dropped, how)


def test_batches_and_subsets_do_not_change_what_is_gathered() -> None:
    given = programs.draw("bert", 4)
    parts = [{key: x[low:high] for key, x in given.items()} for low, high in ((0, 1), (1, 4))]
    whole, split = calibrated("bert", given), calibrated("bert", *parts)
    kept: list[list[Rows]] = []
    for program, one_by_one in ((whole, False), (split, False), (split, True)):
        wanted: dict[Node, list[Rows]] = {n: [Rows(limit=20)] for n in linear_inputs(program)}
        groups = [{node: found} for node, found in wanted.items()] if one_by_one else [wanted]
        for group in groups:
            assert all(seen.samples == 4 for seen in gather(program, group).values())
        kept.append([rows for (rows,) in wanted.values()])
    for one, two, three in zip(*kept, strict=True):
        assert np.array_equal(one.lots, two.lots)
        first, second, third = (np.asarray(rows.kept) for rows in (one, two, three))
        assert np.allclose(first, second, rtol=1e-4, atol=1e-5)  # products of other sizes round
        assert np.array_equal(second, third)


def test_only_what_is_wanted_runs_and_values_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's input needs a part of the graph, and few of its values at a time."""
    program = calibrated("bert", programs.draw("bert", 2))
    first, last = linear_inputs(program)[0], linear_inputs(program)[-1]
    ran: list[Node] = []
    most = 0
    compute = statistics._compute

    def counting(owner: Program, node: Node, values: dict[Node, Any]) -> Any:
        nonlocal most
        ran.append(node)
        most = max(most, sum(held.op != "get_attr" for held in values))
        return compute(owner, node, values)

    monkeypatch.setattr(statistics, "_compute", counting)
    gather(program, {first: [MeanAbs()]})
    early = len(ran)
    gather(program, {last: [MeanAbs()]})
    assert early < 0.2 * (len(ran) - early)
    assert most <= 12


def test_a_mask_of_the_other_sense_and_given_rows() -> None:
    """`encoder_padded` masks where it pads; rows may also be given by hand, or kept all."""
    given = programs.draw("encoder_padded", 3)
    program = calibrated("encoder_padded", given)
    node = linear_inputs(program)[0]
    count = int((~given["padding"]).sum())
    assert count < 36
    (seen,) = gather(program, {node: [MeanAbs()]}).values()
    assert (seen.rows, seen.dropped, seen.padding) == (count, 36 - count, "excluded")
    (seen,) = gather(program, {node: [MeanAbs()]}, {node: "as asked"}).values()
    assert seen == Seen(3, 36, 0, "as asked")
    mask = next(n for n in program.inputs() if n.name == "padding")
    (seen,) = gather(program, {node: [MeanAbs()]}, {node: Real(mask, (1, 0))}).values()
    assert (seen.rows, seen.dropped) == (36 - count, count)


def test_padding_is_found_in_every_layout() -> None:
    """Heads [B, H, N, d] and the flat [B * N, C] hold the same real tokens as [B, N, C]."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            b, n, c = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
            bias = mask[:, None, None, :].bool()
            y = nn.functional.scaled_dot_product_attention(*qkv.unbind(0), bias)
            flat = y.transpose(1, 2).reshape(b * n, c)
            return (x + self.out(flat).reshape(b, n, c))[:, 0]

    given = {
        "x": torch.randn(3, 6, 8),
        "mask": torch.arange(6)[None] < torch.tensor([[6], [2], [3]]),
    }
    program = programs.apply(capture(Flat(), given), programs.NORMAL)[0]
    program.calibration = read_calibration([given], program)
    call = next(n for n in program.nodes() if "scaled_dot" in str(n.target))
    flat = linear_inputs(program)[1]
    assert (len(shape(call)), len(shape(flat))) in {(4, 2), (4, 3)}
    collected: dict[Node, list[Collector]] = {call: [MeanAbs()], flat: [MeanAbs()]}
    notes = gather(program, collected)
    assert notes[flat] == Seen(3, 11, 7, "excluded")
    assert notes[call] == Seen(3, 22, 14, "excluded")


def test_what_has_no_padding_says_so() -> None:
    program = programs.normal("vit")
    notes = {str(find_real(program, node)) for node in linear_inputs(program)}
    assert notes == {NO_MASK, NO_TOKENS}


def test_merged_tokens_are_not_told_from_padding() -> None:
    program = programs.reduced("bert", "merge-tokens{r=2}")[0]
    found = [find_real(program, node) for node in linear_inputs(program)]
    assert any("were merged before" in note for note in found if isinstance(note, str))


def test_statistics_without_data_and_of_no_tensor_are_refused() -> None:
    program = programs.normal("bert")
    node = linear_inputs(program)[0]
    with pytest.raises(UsageError, match=r"no calibration data(.|\n)*--calibration FILE"):
        gather(program, {node: [MeanAbs()]})
    ready = calibrated("bert", programs.draw("bert", 2))
    ids = next(n for n in ready.inputs() if n.name == "input_ids")
    with pytest.raises(PreconditionError, match=r"input_ids .*no floating tensor"):
        gather(ready, {ids: [MeanAbs()]})


def test_values_that_are_not_finite_name_the_node_and_the_batch() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.up(x.sqrt())
            return found

    program = capture(Root(), torch.ones(2, 4))
    program.calibration = read_calibration([torch.ones(2, 4), -torch.ones(2, 4)], program)
    (node,) = linear_inputs(program)
    with pytest.raises(PreconditionError, match=r"sqrt .*NaN or infinity in calibration batch 1"):
        gather(program, {node: [MeanAbs()]})
