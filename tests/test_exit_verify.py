"""Whether exits keep their promise on new rows: what is counted, judged, and refused."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import beta
from torch import Tensor, nn

from effopt.calibration import read_calibration
from effopt.capture import capture
from effopt.engine import Engine, load
from effopt.errors import EffoptError, UnsafeFileError, UsageError, VerificationError
from effopt.exit_verify import LEVEL, ExitCheck, verify_exits
from effopt.folder import Manifest
from effopt.promise import Promise
from effopt.samples import open_samples
from effopt.signature import EXIT_INDEX, Signature, TensorSpec
from tests.cli.shell import Shell, write_engine
from tests.exit_engine import PROMISE, promised, rows, signature, write_exit_engine

Array = NDArray[Any]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


class Plain:
    """Runs the rows of `tests.exit_engine` in numpy; `wide` repeats each answer at two places."""

    def __init__(self, wide: bool = False) -> None:
        self.wide = wide
        self.sizes: list[int] = []

    def run(self, inputs: list[Array]) -> list[Array]:
        x, tau = inputs
        self.sizes.append(len(x))
        leaves = x[:, 6:] >= tau
        logits = np.where(leaves, x[:, 3:6], x[:, :3])
        if self.wide:
            logits = np.stack([logits, x[:, :3]], axis=1)  # the second place never differs
        return [logits, np.where(leaves[:, 0], 1, 2)]


def engine_of(promise: Promise | None, wide: bool = False, **facts: Any) -> Engine:
    """Make an engine in memory."""
    held = signature((0.5,))
    if wide:
        logits = TensorSpec("logits", "float32", ("batch", 2, 3), "logits")
        held = Signature(held.inputs, (logits, held.outputs[1]), held.structure)
    known = {} if promise is None else {"exits": {"promise": promise.to_json()}}
    manifest = Manifest("0.1.0", "cpu", "ort", held, facts={**known, **facts})
    return Engine(Path("out"), manifest, Plain(wide))


def data(folder: Path, given: Array, name: str = "new.npz") -> Path:
    np.savez(folder / name, x=given)
    return folder / name


def check(folder: Path, given: Array, promise: Promise = PROMISE, **more: Any) -> ExitCheck:
    return verify_exits(engine_of(promise, **more), data(folder, given))


# --- what is counted


def test_losses_exits_and_bounds_are_counted(tmp_path: Path) -> None:
    found = check(tmp_path, rows(3, 57, 40))
    assert (found.samples, found.leaves, found.mean_exit) == (100, (60, 40), 1.4)
    assert found.found.mean == pytest.approx(0.03)
    exact = beta.ppf(0.05, 3, 98), beta.ppf(0.95, 4, 97)  # Clopper and Pearson: 3 of 100
    assert (found.found.lower, found.found.upper) == pytest.approx(exact, abs=1e-9)


def test_the_data_go_through_in_batches_that_do_not_matter(tmp_path: Path) -> None:
    engine, runner = engine_of(PROMISE), Plain()
    engine._runner = runner
    found = verify_exits(engine, data(tmp_path, rows(1, 9, 9)))
    assert runner.sizes == [8, 8, 8, 8, 3, 3]
    assert found.leaves == (10, 9)


def test_the_last_place_alone_is_judged_where_the_promise_says_so(tmp_path: Path) -> None:
    given = rows(4, 0, 4)
    assert check(tmp_path, given, promised(position=1), wide=True).found.mean == 0
    whole = check(tmp_path, given, wide=True).found
    assert (whole.mean, whole.samples) == (0.25, 8)
    tokens = check(tmp_path, given, promised(unit="token"), wide=True).found
    assert (tokens.mean, tokens.samples) == (0.25, 16)


@pytest.mark.parametrize("loss", ["kl", "cosine"])
def test_other_losses_are_those_of_the_promise(tmp_path: Path, loss: str) -> None:
    found = check(tmp_path, rows(4, 0, 4), promised(loss=loss)).found
    assert 0 < found.mean <= 0.5  # as half of the rows leave, with another answer
    assert check(tmp_path, rows(0, 4, 4), promised(loss=loss)).found.mean == pytest.approx(0)


# --- what is judged


@pytest.mark.parametrize(
    ("wrong", "right", "verdict"),
    [(0, 200, "confirmed"), (1, 19, "not contradicted"), (40, 160, "contradicted")],
)
def test_the_verdict(tmp_path: Path, wrong: int, right: int, verdict: str) -> None:
    found = check(tmp_path, rows(wrong, right, 50))
    assert found.verdict == verdict
    assert found.to_json()["verdict"] == verdict
    assert max(map(len, found.text().splitlines())) <= 80
    assert f"{verdict}: " in found.text()


def test_a_calibration_by_crc_may_be_above_epsilon_by_its_luck(tmp_path: Path) -> None:
    crc = promised(rule="crc", delta=None, samples=300)
    found = check(tmp_path, rows(700, 9300, 0), crc)  # 7 % on so many rows: surely above 5 %
    assert found.found.lower > crc.epsilon
    assert found.verdict == "not contradicted"
    # One sees no further: 14 of 300 errors leave open 7.1 % by the exact bound, more by this one.
    assert beta.ppf(1 - LEVEL, 15, 286) < found.allowed < 0.09
    assert check(tmp_path, rows(1000, 9000, 0), crc).verdict == "contradicted"


def test_a_promise_by_crc_is_seldom_contradicted_where_it_holds(tmp_path: Path) -> None:
    generator, crc = np.random.default_rng(0), promised(rule="crc", delta=None, samples=300)
    allowed = check(tmp_path, rows(1, 1, 1), crc).allowed
    # Row i loses from setting u_i on, uniform: a threshold t has the risk t. The last setting that
    # passes is the one before the 15th of them, as (15 + 1) / 301 is above 5 %.
    risks = np.sort(generator.random((2000, 300)), axis=1)[:, 14]
    assert (risks > 0.05).mean() > 0.3  # so an epsilon alone would contradict a third of them
    assert (risks > allowed).mean() <= LEVEL


def test_an_engine_that_never_exits_is_confirmed(tmp_path: Path) -> None:
    never = float("inf")
    held = promised(tau=(never,), index=0, shares=(0.0, 1.0), risk=0.0)
    folder = write_exit_engine(tmp_path / "out", held, tau=(never,))
    found = verify_exits(load(folder), data(tmp_path, rows(100, 0, 0)))
    assert (found.verdict, found.leaves, found.found.mean) == ("confirmed", (0, 100), 0.0)


def test_rows_that_leave_elsewhere_than_those_that_calibrated_are_told(tmp_path: Path) -> None:
    assert check(tmp_path, rows(0, 160, 140)).shifted == ()
    found = check(tmp_path, rows(0, 260, 40))
    assert found.shifted == (1, 2)
    assert "these rows are others" in found.text()


# --- what is refused


@pytest.mark.parametrize("size", [8, 1000])
def test_rows_that_have_calibrated_are_refused(tmp_path: Path, size: int) -> None:
    given = rows(5, 10, 15)
    digest = hashlib.sha256()
    for start in range(0, len(given), size):
        digest.update(given[start : start + size].tobytes())
    held = promised(rows=digest.hexdigest())
    with pytest.raises(UsageError, match="have calibrated these exits"):
        check(tmp_path, given, held)
    assert check(tmp_path, given[1:], held).samples == 29


def test_hashes_of_several_inputs_are_by_batch_and_as_one(tmp_path: Path) -> None:
    one, two = np.arange(20, dtype=np.int64).reshape(10, 2), np.arange(10, dtype=np.float32)
    table = np.ones((1, 3), np.float32)
    np.savez(tmp_path / "new.npz", two=two, one=one, table=table)
    specs = [
        TensorSpec("one", "int64", ("batch", 2), "one"),
        TensorSpec("two", "float32", ("batch",), "two"),
        TensorSpec("table", "float32", (1, 3), "table"),
    ]
    found = open_samples(tmp_path / "new.npz", specs)
    assert [list(batch) for batch in found] == [["one", "two", "table"]] * 2
    assert [len(batch["one"]) for batch in found] == [8, 2]
    parts = [one[:8], two[:8], table, one[8:], two[8:], table]
    hashes = [
        hashlib.sha256(b"".join(p.tobytes() for p in ps)) for ps in (parts, [one, two, table])
    ]
    assert found.hashes() == tuple(digest.hexdigest() for digest in hashes)


def test_a_file_is_cut_into_the_batches_that_calibration_cuts(tmp_path: Path) -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    program = capture(Add(), {"x": torch.ones(2, 3), "y": torch.ones(2, 3)})
    given = np.arange(60, dtype=np.float32).reshape(20, 3)
    np.savez(tmp_path / "new.npz", x=given, y=-given)
    digest = hashlib.sha256()
    for batch in read_calibration(tmp_path / "new.npz", program):
        for tensor in batch:
            digest.update(tensor.numpy().tobytes())
    found = open_samples(tmp_path / "new.npz", program.signature.inputs)
    assert found.hashes()[0] == digest.hexdigest()


def save(**arrays: Array) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no file"),
        (save(y=rows(0, 1, 0)), "lacks 'x'"),
        (save(x=rows(0, 1, 0), tau=np.ones(1, np.float32)), "has 'tau', which is no input"),
        (save(x=rows(0, 1, 0).astype(np.float64)), "is float64, the engine takes float32"),
        (save(x=rows(0, 1, 0)[:, :6]), "is [1, 6], the engine takes [samples, 7]"),
        (save(x=rows(0, 1, 0)[0]), "is [7], the engine takes [samples, 7]"),
        (save(x=rows(0, 1, 0)[:0]), "has 0 samples"),
        (save(x=np.full((2, 7), np.inf, np.float32)), "holds NaN or infinity"),
    ],
)
def test_a_wrong_file(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "new.npz"
    write(path)
    with pytest.raises(UsageError) as caught:
        verify_exits(engine_of(PROMISE), path)
    assert message in str(caught.value)


def test_counts_that_differ_or_do_not_fill_a_fixed_batch(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", x=np.ones((4, 2), np.float32), y=np.ones(3, np.float32))
    sizes = {"x": ("batch", 2), "y": ("batch",)}
    specs = [TensorSpec(name, "float32", shape, name) for name, shape in sizes.items()]
    with pytest.raises(UsageError, match="'x' has 4, 'y' has 3"):
        open_samples(tmp_path / "two.npz", specs)
    np.savez(tmp_path / "one.npz", x=np.ones((4, 2), np.float32))
    fixed = [TensorSpec("x", "float32", (3, 2), "x")]
    with pytest.raises(UsageError, match="4 samples, and the engine takes batches of 3"):
        open_samples(tmp_path / "one.npz", fixed)


@pytest.mark.parametrize(
    ("engine", "kind", "message"),
    [
        (engine_of(None), UsageError, "were not calibrated"),
        (engine_of(promised(reference="original")), UsageError, "against the original model"),
        (engine_of(promised(tau=(0.4,))), VerificationError, "not those that the promise"),
        (engine_of(promised(output="probs")), UnsafeFileError, "its output is not there"),
        (engine_of(promised(position=1)), UnsafeFileError, "its output is not there"),
        (engine_of(None, exits=5), UnsafeFileError, "damaged"),
        (engine_of(None, exits={"promise": {}}), UnsafeFileError, "damaged"),
        (engine_of(None, exits={"promise": {**PROMISE.to_json(), "epsilon": "x"}}),
         UnsafeFileError, "epsilon is 'x'"),
    ],
)  # fmt: skip
def test_an_engine_without_a_sound_promise(
    tmp_path: Path, engine: Engine, kind: type[EffoptError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        verify_exits(engine, data(tmp_path, rows(1, 1, 1)))
    assert message in str(caught.value)


def test_exits_that_are_none(tmp_path: Path) -> None:
    engine = engine_of(PROMISE)

    class Odd(Plain):
        def run(self, inputs: list[Array]) -> list[Array]:
            logits, taken = super().run(inputs)
            return [logits, taken + 5]

    engine._runner = Odd()
    with pytest.raises(VerificationError, match=f"{EXIT_INDEX} names no exit"):
        verify_exits(engine, data(tmp_path, rows(1, 1, 1)))


# --- against the original


def test_the_original_is_the_reference_where_the_promise_says_so(tmp_path: Path) -> None:
    engine = engine_of(promised(reference="original"))

    def other(inputs: Any) -> dict[str, Array]:
        return {"logits": inputs["x"][:, 3:6]}

    found = verify_exits(engine, data(tmp_path, rows(30, 0, 10)), other)
    assert found.found.mean == 0.25  # rows that stay differ from it, and those that leave do not
    with pytest.raises(VerificationError, match="has no output 'logits' of the shape"):
        verify_exits(engine, data(tmp_path, rows(3, 0, 1)), lambda inputs: {})


def test_the_model_alone_is_run_where_it_is_the_reference(tmp_path: Path) -> None:
    engine, runner = engine_of(promised(reference="original")), Plain()
    engine._runner = runner
    path = data(tmp_path, rows(1, 1, 1))
    verify_exits(engine, path, lambda inputs: {"logits": inputs["x"][:, :3]})
    assert runner.sizes == [3]


# --- the command


def test_the_command(shell: Shell, tmp_path: Path) -> None:
    folder = write_exit_engine(tmp_path / "out")
    code, document = shell.json("verify", folder, "--data", data(tmp_path, rows(2, 158, 140)))
    assert code == 0
    found = document["exits"]
    assert (found["verdict"], found["samples"], found["exits"]) == ("confirmed", 300, [160, 140])
    assert found["lower"] < found["mean"] < found["upper"] < found["epsilon"] == 0.05
    code, text = shell("verify", folder, "--data", tmp_path / "new.npz")
    assert code == 0
    assert text.split("Exits on")[1] == TEXT


TEXT = """\
 300 samples of new.npz

exit   rows   share    when calibrated
──────────────────────────────────────
1      160    53.3 %   50.0 %
end    140    46.7 %   50.0 %

average exit: 1.47 of 2
promise: disagree against the engine that never exits at most 5.00% with 95%
  confidence (ltt, 300 samples)
mean loss: 0.667 % of 300 samples; bounds 0.119 % to 2.08 %, each with 95%
  confidence
confirmed: by these rows alone, the loss is at most 5.00 % with 95% confidence
note: this holds for new rows only, that have neither fitted nor calibrated
  these exits
"""


def test_the_command_fails_where_the_promise_is_contradicted(shell: Shell, tmp_path: Path) -> None:
    folder = write_exit_engine(tmp_path / "out")
    code, _ = shell("verify", folder, "--data", data(tmp_path, rows(30, 80, 70)))
    assert code == 5
    assert "the mean loss is 16.7 %, with 95% confidence above 12.3 %" in shell.err
    assert "at most 5.00 % would keep the promise" in shell.err


def test_the_command_on_an_engine_without_exits(shell: Shell, tmp_path: Path) -> None:
    folder = write_engine(tmp_path / "out")
    code, _ = shell("verify", folder, "--data", data(tmp_path, rows(1, 1, 1)))
    assert code == 2
    assert "has no exits" in shell.err


MODEL = """
import torch
class Ends(torch.nn.Module):
    def forward(self, x): return {"logits": x[:, :3] * 1.0}
def make(): return Ends(), {"x": torch.ones(2, 7)}
"""


def test_the_command_against_the_original(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "exit_ends.py").write_text(MODEL)
    monkeypatch.delitem(sys.modules, "exit_ends", raising=False)
    folder = write_exit_engine(tmp_path / "out", promised(reference="original"))
    path = data(tmp_path, rows(2, 158, 140))
    code, _ = shell("verify", folder, "--data", path)
    assert (code, "--against" in shell.err) == (2, True)
    code, document = shell.json("verify", folder, "--data", path, "--against", "exit_ends:make")
    assert code == 0, document
    assert document["exits"]["mean"] == pytest.approx(2 / 300)
    assert document["exits"]["reference"] == "original"


def test_verifying_exits_loads_no_torch(tmp_path: Path) -> None:
    folder = write_exit_engine(tmp_path / "out")
    words = ["verify", str(folder), "--data", str(data(tmp_path, rows(0, 90, 9)))]
    code = f"import sys, effopt.__main__ as m; m.main({words}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
