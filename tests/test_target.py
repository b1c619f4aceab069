"""The table of targets: what a user can name, and that its figures hang together."""

import subprocess
import sys

import pytest

from effopt.backends import TABLE
from effopt.errors import UsageError
from effopt.target import TARGETS, target


def test_every_row_names_a_backend_that_exists() -> None:
    assert [row.name for row in TARGETS.values()] == list(TARGETS)
    assert {row.backend for row in TARGETS.values()} <= set(TABLE)


def test_the_promised_targets_are_there() -> None:
    promised = "cpu onnx t4 a100 a10 l4 rtx4090 h100 h200 b200 orin"
    assert list(TARGETS) == promised.split()


@pytest.mark.parametrize("name", list(TARGETS))
def test_peaks_are_of_types_that_the_target_computes_in(name: str) -> None:
    row = target(name)
    for kind, figure in row.peak:
        assert kind in (*row.dtypes, *row.schemes)
        assert 5 < figure < 10_000  # Tera-operations a second, not Giga, not with sparsity
    assert row.gpu == (name not in ("cpu", "onnx"))


def test_float8_starts_with_ada_and_bfloat16_with_ampere() -> None:
    for row in TARGETS.values():
        if row.gpu:
            arch = int(row.arch.removeprefix("sm_"))
            assert ("fp8" in row.schemes) == (arch >= 89)
            assert ("bfloat16" in row.dtypes) == ("2:4" in row.features) == (arch >= 80)


def test_unknown_target_offers_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        target("a1000")
    assert str(caught.value) == "unknown target 'a1000'\n  remedy: did you mean 'a100'?"


def test_plugins_of_a_gpu_target_can_be_left_out() -> None:
    assert target("a100").plugins
    assert target("a100{plugins=on}") == target("a100")
    without = target("a100{plugins=off}")
    assert (without.name, without.plugins, without.arch) == ("a100{plugins=off}", False, "sm_80")
    assert target(without.name) == without, "a manifest holds the name"


@pytest.mark.parametrize("text", ["cpu{plugins=off}", "a100{speed=9}", "a100{plugins=maybe}"])
def test_options_that_a_target_does_not_have(text: str) -> None:
    with pytest.raises(UsageError, match="options that it does not know"):
        target(text)


def test_the_table_of_backends_loads_no_torch_and_no_runtime() -> None:
    code = (
        "import sys, effopt.target, effopt.backends, effopt.engine, effopt.backends.ort\n"
        "print([m for m in ('torch', 'onnxruntime', 'onnxscript') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
