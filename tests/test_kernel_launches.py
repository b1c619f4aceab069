"""What launches compute at their edges, on the host; golden examples of kernels made for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import effopt
from effopt.backends.kernels.quantized_linear import packed
from effopt.exit_flow import Flow, Part
from effopt.kernel import kernel
from effopt.plugin import running
from tests.plugin_runs import on_host
from tests.test_plugins import TOLERANCES, counted, plugin_of
from tests.zoo import make


@contextmanager
def launches() -> Iterator[list[str]]:
    """Run plugins on the host; gives the list of those that ran."""
    calls = list[str]()
    with running(counted(on_host, calls)):
        yield calls


# --- attention_row ------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, bias: Tensor | None, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return the score as launched and as meant."""
    size = torch.ones(k.shape[0], k.shape[2])
    given = (q, k, bias, size, rows, 0.3, False)
    return plugin_of("AttentionRow").adapt(*given), kernel("attention_row").lowering(*given)


@pytest.mark.parametrize("kind", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("keys", "depth"), [(700, 9), (1400, 8), (2900, 16), (5000, 40), (5000, 512)]
)
def test_rows_of_attention_as_many_as_shared_memory_holds(
    keys: int, depth: int, kind: torch.dtype
) -> None:
    """Of 9 rows 8, 4 or 1 at a time; keys in one tile and in many, by 16 bytes and one by one."""
    draw = torch.Generator().manual_seed(keys)
    q = (torch.randn(1, 2, 9, depth, generator=draw) * (8 / depth) ** 0.5).to(kind)
    k = torch.randn(1, 1, keys, depth, generator=draw).to(kind)
    with launches() as calls:
        got, want = attend(q, k, torch.randn(1, 1, 1, keys, generator=draw), list(range(9)))
    assert calls == ["AttentionRow"]
    assert (got - want).abs().max() <= TOLERANCES[kind] * want.max()


@pytest.mark.parametrize(("keys", "depth"), [(5001, 8), (8, 513)])
def test_rows_of_attention_that_no_block_holds_go_without_a_launch(keys: int, depth: int) -> None:
    with launches() as calls:
        attend(torch.randn(1, 1, 1, depth), torch.randn(1, 1, keys, depth), None, [0])
    assert not calls


def test_a_pruned_model_scores_by_one_launch_a_site(tmp_path: Path) -> None:
    """In onnxruntime its function stands for it (measured: 4e-7 of outputs up to 1.6)."""
    model, inputs = make("vit")
    made = effopt.optimize(model, inputs, target="a100", recipe="prune-tokens{keep=0.6}")
    made.save(tmp_path / "out")
    file = onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert [node.op_type for node in file.graph.node].count("AttentionRow") == 3
    (got,) = effopt.load(tmp_path / "out")(inputs["pixel_values"].numpy()).values()
    (want,) = made.program.run((inputs["pixel_values"],))
    assert np.abs(got - want.numpy()).max() <= 1e-5


def test_a_query_that_sees_nothing_attends_to_all_alike() -> None:
    q, k = torch.randn(2, 1, 1, 4, 8).unbind()
    with launches():
        got, want = attend(q, k, torch.zeros(4, dtype=torch.bool), [1])
    assert torch.equal(got, torch.full((1, 4), 0.25))
    assert torch.equal(want, got)


# --- pool_tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["op", "lowering", "launch"])
def test_a_token_counts_as_often_as_it_has_originals(form: str) -> None:
    found = kernel("pool_tokens")
    run = plugin_of("PoolTokens").adapt if form == "launch" else getattr(found, form)
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    with launches():
        got = run(x, torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    assert got.tolist() == [[2.5, 3.5], [0.0, 0.0]]


# --- compact_rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["op", "lowering", "launch"])
def test_rows_that_stay_come_first_and_lead_back(form: str) -> None:
    found = kernel("compact_rows")
    run = plugin_of("CompactRows").adapt if form == "launch" else getattr(found, form)
    x = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    with launches():
        rows, order, count = run(x, torch.tensor([False, True, False, True]))
    assert rows[:, 0].tolist() == [20, 40, 10, 30]
    assert order.tolist() == [1, 3, 0, 2]
    assert count.tolist() == [2]
    back = torch.empty_like(x)
    back[order] = rows
    assert torch.equal(back, x)


def test_rows_leave_between_segments_as_in_an_exit_flow() -> None:
    """Three segments that double and add: what a runner on a device does against `Flow`."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(7, 4, generator=draw)
    tau = np.array([0.2, 1.5], np.float32)
    answers, order = torch.full((7,), torch.nan), torch.arange(7)
    rows = x
    with launches():
        for place in range(3):
            rows = 2 * rows + place
            score = rows[:, 0]
            answers[order] = rows.sum(1)  # of rows that go on, later segments write again
            if place < 2:
                stay = score < float(tau[place])
                rows, own, count = plugin_of("CompactRows").adapt(rows, stay)
                rows, order = rows[: int(count)], order[own][: int(count)]
    assert torch.equal(answers, torch.from_numpy(_flow().run([x.numpy(), tau])[0]))


def _flow() -> Flow:
    def part(place: int) -> Part:
        def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
            hidden = 2 * arrays[0] + np.float32(place)
            found = [hidden[:, 0]] if place < 2 else []
            return [*found, torch.from_numpy(hidden).sum(1).numpy(), hidden][
                : 3 if place < 2 else 1
            ]

        handed = (f"h{place}",) if place < 2 else ()
        reads = (f"h{place - 1}",) if place else ("x",)
        return Part(reads, place < 2, ("y",), {}, handed, run)

    rows = {"x": 0, "h0": 0, "h1": 0}
    return Flow((part(0), part(1), part(2)), rows, ("x",), ("y",))


# --- quantized_linear ---------------------------------------------------------------------------


def test_eight_neighbours_of_4_bits_are_one_number() -> None:
    codes = torch.tensor([[-8] * 8, [7] * 8, [1, -8, -8, -8, -8, -8, -8, -8], [0] * 7 + [-8]])
    made = packed(codes.to(torch.int8))
    assert made.dtype == torch.int32
    assert made.tolist() == [[-(2**31)], [2**31 - 1], [9 - 2**31], [0x08888888 - 2**31]]
