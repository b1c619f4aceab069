"""Exits as engines of their own: numbers, the file of weights, the record, and rows that go on."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

import effopt
from effopt.backend import Array, as_array
from effopt.backends.exit_runner import ExitRunner
from effopt.backends.onnx import WEIGHTS
from effopt.backends.session import Session
from effopt.backends.split import PAGE, share_weights
from effopt.engine import INTEGERS, Engine
from effopt.errors import PreconditionError, UnsafeFileError, UsageError
from effopt.folder import MANIFEST
from effopt.folder import read as read_folder
from effopt.pipeline import Pipeline
from effopt.program import Program
from effopt.recipe import steps_of
from tests.exited import built, compare, eager, net, of_zoo, pairs, saved, thresholds

INT8 = "quantize{scheme=int8-dynamic,least=16}"
INT4 = "quantize{scheme=int4-rtn,least=16}"
BATCHES = (1, 3, 16)


def net_inputs(rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    scale = torch.rand(64, generator=torch.Generator().manual_seed(9)) + 0.5
    return torch.randn(rows, 4, 64, generator=draw), scale


def images(rows: int) -> tuple[Tensor, ...]:
    return (torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(rows)),)


def texts(rows: int, length: int = 12) -> tuple[Tensor, ...]:
    """Rows of different lengths, so that every row needs its own mask behind the exits."""
    ids = torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.arange(length) < (3 + 5 * torch.arange(rows) % (length - 2))[:, None]
    return ids.masked_fill(~mask, 1), mask.long()


@pytest.fixture(scope="module")
def program() -> Program:
    return net()


@pytest.fixture(scope="module")
def folder(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(program, tmp_path_factory.mktemp("split") / "out")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return effopt.load(folder)


# --- numbers ----------------------------------------------------------------------------------


def test_every_mixture_of_exits(program: Program, engine: Engine) -> None:
    """Rows at dimensions 0 and 1, a value without rows, outputs named like values of segments."""
    for rows in BATCHES:
        worst, seen = compare(program, engine.run, net_inputs(rows))
        assert worst < 1e-5  # 1.4e-6 was measured
        assert seen == {1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["if", "compact"])
def test_outputs_named_like_values_of_segments(form: str, tmp_path: Path) -> None:
    """An output named "score" was taken for the score of the exit, in forms of one file too."""
    found = net(form)
    worst, seen = compare(found, built(found, tmp_path).run, net_inputs(3))
    assert worst < 1e-5
    assert seen == {1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("exits", [1, 2])
def test_a_mask_goes_on_with_its_rows(exits: int, tmp_path: Path) -> None:
    found = of_zoo("bert", dynamic=("batch", "length"), exits=exits)
    run = built(found, tmp_path).run
    for rows, length in ((1, 7), (3, 12), (16, 7)):
        worst, seen = compare(found, run, texts(rows, length), most=4)
        assert worst < 1e-5  # 2.4e-6 was measured
        assert seen == {*range(1, exits + 2)}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [INT8, INT4])
def test_integer_layers(recipe: str, tmp_path: Path) -> None:
    found, _ = Pipeline(steps_of(recipe)).run(net())
    _check_integers(found, tmp_path, net_inputs)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [INT8, INT4])
def test_an_image_model_on_integers(recipe: str, tmp_path: Path) -> None:
    _check_integers(of_zoo("vit", recipe), tmp_path, images)


def _check_integers(
    found: Program, path: Path, inputs: Callable[[int], tuple[Tensor, ...]]
) -> None:
    """Tolerances are those of a folder's check: layers round over the rows that are there."""
    made = effopt.load(saved(found, path / "out"))
    noise = made.manifest["facts"]["integer_noise"]
    for rows in BATCHES:
        given = inputs(rows)
        for tau in thresholds(found, given, 4):
            want = eager(found, given, tau)
            got = made.run([*map(as_array, given), np.array(tau, np.float32)])
            names = [spec.name for spec in found.signature.outputs]
            place = names.index("exit_index")
            same = got[place] == want[place]
            assert same.all()  # scores are further from their thresholds than rounding moves them
            for name, one, other in zip(names, got, want, strict=True):
                if name in ("score", "logits"):
                    scale = np.abs(other).max()
                    assert np.abs(one - other)[same].max() < INTEGERS * noise * scale


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "onnx"])
def test_an_image_model(name: str, tmp_path: Path) -> None:
    found = of_zoo("vit")
    run = built(found, tmp_path, name).run
    for rows in BATCHES:
        worst, seen = compare(found, run, images(rows))
        assert worst < 1e-5  # 5.2e-6 was measured
        assert seen == {1, 2, 3}


# --- which rows run ---------------------------------------------------------------------------


def test_a_segment_runs_on_the_rows_that_are_left(program: Program, engine: Engine) -> None:
    inputs = net_inputs(16)
    middle = thresholds(program, inputs, 3)[4]  # neither is infinite
    never, always = (np.inf, np.inf), (-np.inf, -np.inf)
    index = eager(program, inputs, middle)[-1]
    left = [16, int((index > 1).sum()), int((index > 2).sum())]
    assert 16 > left[1] > left[2] > 0
    for tau, want in ((never, [16, 16, 16]), (middle, left), (always, [16])):
        ran = list[int]()
        _watched(engine, ran).run([*map(as_array, inputs), np.array(tau, np.float32)])
        assert ran == want


def _watched(engine: Engine, ran: list[int]) -> Any:
    flow: Any = engine._runner.flow  # type: ignore[attr-defined]

    def watched(run: Callable[[list[Array]], list[Array]]) -> Callable[[list[Array]], list[Array]]:
        def counted(arrays: list[Array]) -> list[Array]:
            outputs = run(arrays)
            ran.append(len(outputs[0]))
            return outputs

        return counted

    return replace(flow, parts=tuple(replace(p, run=watched(p.run)) for p in flow.parts))


def test_a_score_that_meets_its_threshold_leaves(program: Program, engine: Engine) -> None:
    inputs = net_inputs(3)
    first = engine._runner.flow.parts[0]  # type: ignore[attr-defined]
    score = first.run([as_array(x) for x in inputs])[0]
    index = engine(*inputs, tau=[score[1], np.inf])["exit_index"]
    assert index.tolist() == [1 if x >= score[1] else 3 for x in score]


# --- the folder -------------------------------------------------------------------------------


def test_each_weight_is_stored_once(folder: Path) -> None:
    regions, data = dict[bytes, tuple[int, int]](), (folder / WEIGHTS).read_bytes()
    used = 0
    for place in (1, 2, 3):
        path = folder / f"segment{place}.onnx"
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
            if not tensor.external_data:
                assert len(tensor.raw_data) < PAGE, "small ones alone stay inside"
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == WEIGHTS
            begin, length = int(entries["offset"]), int(entries["length"])
            assert begin % PAGE == 0
            region = regions.setdefault(data[begin : begin + length], (begin, length))
            assert region == (begin, length), "equal bytes lie in two places"
            used += 1
    assert used == len(regions) == 3
    sizes = [length for _, length in regions.values()]
    assert sum(sizes) <= len(data) < sum(sizes) + PAGE * len(sizes)


def test_equal_weights_of_several_segments_are_one(tmp_path: Path) -> None:
    """Of other names, types and shapes; what differs in its last byte is another one."""
    ones = np.ones((32, 64), np.float32)
    other = ones.copy()
    other[-1, -1] = 2
    kept = {
        "a": [("w", ones), ("w2", ones.reshape(64, 32)), ("small", ones[:3])],
        "b": [("v", ones.view(np.int32)), ("other", other)],
    }
    graphs = [_graph(name, arrays) for name, arrays in kept.items()]
    share_weights(graphs, tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_size == 2 * ones.nbytes
    for graph, arrays in zip(graphs, kept.values(), strict=True):
        for name, array in arrays:
            tensor = graph.initializers[name].const_value
            assert tensor is not None
            assert np.array_equal(tensor.numpy(), array)
            assert isinstance(tensor, ir.ExternalTensor) == (array.nbytes >= PAGE)


def _graph(name: str, arrays: list[tuple[str, Array]]) -> ir.Graph:
    weights = [ir.Value(name=n, const_value=ir.tensor(array, name=n)) for n, array in arrays]
    return ir.Graph([], [], nodes=[], initializers=weights, name=name)


def test_running_it_needs_no_torch(folder: Path) -> None:
    code = f"""
import json, sys
import numpy as np
import effopt
engine = effopt.load({str(folder)!r})
x, scale = np.ones((2, 4, 64), np.float32), np.ones(64, np.float32)
ticket = engine.queue(size=2).submit(x, scale)
print(json.dumps([engine(x, scale)["exit_index"].tolist(), "torch" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert json.loads(done.stdout) == [[3, 3], False]


def test_a_batch_of_fixed_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="rows cannot leave a batch of fixed size"):
        built(net(dynamic=()), tmp_path)


@pytest.mark.parametrize("flat", [False, True])
def test_rows_that_cannot_be_told_apart_are_refused(flat: bool, tmp_path: Path) -> None:
    """Taking rows out of [B, B] along one dimension would leave the others in the second."""
    words = r"rows and something else share a dimension of \w+, or rows have two"
    with pytest.raises(PreconditionError, match=words) as caught:
        built(pairs(flat), tmp_path)
    assert caught.value.remedy == "give lower=if"


# --- a record from a stranger -----------------------------------------------------------------


def _put(*keys: Any, to: Any) -> Callable[[Any], None]:
    def change(record: Any) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = to

    return change


DAMAGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "no mapping": (lambda record: record.clear(), "segments is no list"),
    "a path": (_put("segments", 0, "file", to="../segment1.onnx"), "no name of a segment's file"),
    "no file": (_put("segments", 0, "file", to="segment9.onnx"), "no file segment9"),
    "one file twice": (_put("segments", 0, "file", to="segment2.onnx"), "names a file twice"),
    "one segment": (lambda record: record["segments"].__delitem__(slice(1, 3)), "fewer than two"),
    "a number for a name": (_put("segments", 0, "answers", to=[1]), "is no name"),
    "a name twice": (_put("segments", 0, "handed", to=["a", "a"]), "a name twice"),
    "no score": (_put("segments", 0, "scored", to=False), "must be scored"),
    "a word for a truth": (_put("segments", 0, "scored", to="yes"), "neither scored nor not"),
    "other answers": (_put("segments", 1, "answers", to=["other"]), "do not answer the same"),
    "late outputs": (_put("segments", 1, "ready", to={"x": 0}), "only the first"),
    "other outputs": (_put("segments", 0, "ready", to={"x": 0}), "not those of the engine"),
    "other values": (_put("segments", 0, "handed", to=["y"]), "other values than it says"),
    "nobody gives it": (
        _put("segments", 1, "signature", "inputs", 0, "name", to="y"),
        "nobody gives 'y', which segment2.onnx reads",
    ),
    "rows of nothing": (_put("rows", "y", to=0), "nobody reads it"),
    "no rows": (_put("rows", to={}), "reads no rows"),
    "rows at a fixed size": (_put("rows", "x", to=1), "'x' has no rows at 1"),
    "rows far away": (_put("rows", "x", to=9), "'x' has no rows at 9"),
    "rows at a truth": (_put("rows", "x", to=True), "has rows at"),
    "rows below zero": (_put("rows", "x", to=-1), "has rows at"),
    "outputs with rows nowhere": (_put("segments", 0, "ready", "add", to=2), "no rows at 2"),
    "no signature": (_put("segments", 0, "signature", to=3), "a signature is no mapping"),
    "half a signature": (_put("segments", 0, "signature", to={}), "the signature is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_record_is_refused(name: str, folder: Path) -> None:
    damage, words = DAMAGES[name]
    manifest = read_folder(folder)
    record = copy.deepcopy(manifest.facts["split"])
    damage(record)
    with pytest.raises(UnsafeFileError, match=words):
        ExitRunner(folder, manifest.signature, record, Session)


def test_a_record_for_other_thresholds_is_refused(folder: Path) -> None:
    manifest = read_folder(folder)
    less = replace(manifest.signature, inputs=manifest.signature.inputs[:-1])
    with pytest.raises(UnsafeFileError, match="one threshold for each exit"):
        ExitRunner(folder, less, manifest.facts["split"], Session)


def test_a_hostile_segment_is_not_opened(folder: Path, tmp_path: Path) -> None:
    """Every file is checked, not the first alone."""
    manifest = read_folder(folder)
    for item in folder.iterdir():
        (tmp_path / item.name).write_bytes(item.read_bytes())
    model = onnx.load(str(folder / "segment3.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == "offset").value = "99999999"
    (tmp_path / "segment3.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsafeFileError, match=r"segment3\.onnx: tensor .* its bytes end at"):
        ExitRunner(tmp_path, manifest.signature, manifest.facts["split"], Session)


def test_a_changed_segment_is_refused(folder: Path, tmp_path: Path) -> None:
    for item in folder.iterdir():
        (tmp_path / item.name).write_bytes(item.read_bytes())
    assert json.loads((tmp_path / MANIFEST).read_text())["facts"]["split"]
    with open(tmp_path / WEIGHTS, "r+b") as file:
        file.write(b"\1\2\3\4")
    with pytest.raises(UnsafeFileError, match="its hash differs"):
        effopt.load(tmp_path)


# --- queues -----------------------------------------------------------------------------------


def test_rows_of_several_calls_go_on_together(program: Program, engine: Engine) -> None:
    """Each call gets what it gets alone, for thresholds of its own, in its own order."""
    calls = [net_inputs(rows, seed) for seed, rows in enumerate((5, 1, 7, 3))]
    taus = [sorted(thresholds(program, call, 3))[-2] for call in calls]
    queue = engine.queue(size=4, age=1e9)
    tickets = [queue.submit(*x, tau=list(tau)) for x, tau in zip(calls, taus, strict=True)]
    queue.flush()
    total = [0, 0, 0]
    for ticket, call, tau in zip(tickets, calls, taus, strict=True):
        alone, together = engine(*call, tau=list(tau)), ticket.result()
        assert list(together) == list(alone)
        for name, want in alone.items():
            np.testing.assert_allclose(together[name], want, atol=1e-5, err_msg=name)  # 9.5e-7
        assert together["exit_index"].tolist() == alone["exit_index"].tolist()
        total = [n + int((alone["exit_index"] > e).sum()) for e, n in enumerate(total)]
    assert [count.rows for count in queue.counts] == total
    assert [count.runs for count in queue.counts] == [-(-rows // 4) for rows in total]
    assert total[2], "rows that stay to the end"


def test_an_engine_of_one_file_has_no_queue(engine: Engine) -> None:
    class OneFile:
        def run(self, inputs: list[Array]) -> list[Array]:
            return inputs

    one = Engine(engine.folder, read_folder(engine.folder), OneFile())
    with pytest.raises(UsageError, match="no segments that rows could wait between") as caught:
        one.queue()
    assert "split" in caught.value.remedy
