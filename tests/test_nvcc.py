"""Which nvcc compiles, what is kept of its work, and what is said of one that cannot be used.

Stand-ins for nvcc are shell scripts; no test here needs a real one.
"""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from effopt.backends import nvcc
from effopt.backends.nvcc import available, compile_ptx, find
from effopt.backends.trt_kernels import write_kernels
from effopt.errors import MissingError, VerificationError

STEM = "gather_tokens"
_SCRIPT = """#!/bin/sh
if [ "$1" = --version ]; then {version}; exit 0; fi
{work}
while [ "$1" != -o ]; do shift; done
printf '.version {ptx}\\n.target sm_80\\n// by {release}\\n' > "$2"
"""
Install = Callable[..., Path]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Give the machine an nvcc in a place, in a world where there was none."""
    (tmp_path / "path").mkdir()
    for name, program in (("g++", "true"), ("sleep", "sleep")):
        (tmp_path / "path" / name).symlink_to(str(shutil.which(program)))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(nvcc, "_PACKAGE", tmp_path / "package" / "nvcc")
    places = {"package": tmp_path / "package", "path": tmp_path / "path"}
    places["home"] = tmp_path / "home" / "bin"

    def install_one(place: str, release: str, ptx: str, work: str = "", version: str = "") -> Path:
        path = places[place] / "nvcc"
        path.parent.mkdir(parents=True, exist_ok=True)
        tells = version or f"echo 'Cuda compilation tools, release {release}, V{release}.88'"
        path.write_text(_SCRIPT.format(version=tells, work=work, ptx=ptx, release=release))
        path.chmod(0o755)
        if place == "home":
            monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        nvcc.release.cache_clear()  # as in a new process
        return path

    return install_one


def test_the_package_is_taken_before_a_toolkit(install: Install) -> None:
    """What the remedy installs was hidden by CUDA_HOME and by the path."""
    on_path = install("path", "13.0", "9.0")
    assert find() == on_path
    at_home = install("home", "13.0", "9.0")
    assert find() == at_home
    assert find() != (package := install("package", "13.0", "9.0"))
    assert find() == package


def test_a_too_new_nvcc_is_passed_over(install: Install) -> None:
    install("package", "13.1", "9.1")
    install("home", "14.0", "10.0")
    older = install("path", "12.9", "8.8")
    assert find() == older
    assert available().ok


def test_where_all_are_too_new_kernels_stay_pending(install: Install, tmp_path: Path) -> None:
    path = install("home", "13.1", "9.1")
    assert find() is None
    reason = available().reason
    assert reason.startswith(f"{path} is of release 13.1, whose PTX drivers of CUDA 13.0 do not")
    assert reason.endswith("pip install 'effopt[nvcc]', and a C++ compiler beside it")
    with pytest.raises(MissingError, match=r"of release 13\.1") as caught:
        compile_ptx(STEM, "sm_80")
    assert caught.value.remedy.startswith("pip install 'effopt[nvcc]'")
    files, pending = write_kernels(tmp_path, ["GatherTokens"], "sm_80")
    assert (files, pending) == ([], f"kernels: {STEM} to be compiled for sm_80 ({reason})")


@pytest.mark.parametrize("version", ["exit 1", "echo hello", "exec /no/such/program"])
def test_an_nvcc_without_a_release_is_passed_over(install: Install, version: str) -> None:
    path = install("home", "13.0", "9.0", version=version)
    assert available().reason.startswith(f"{path} does not tell its release: ")
    assert find() != (good := install("path", "13.0", "9.0"))
    assert find() == good


def test_what_another_release_wrote_is_not_read_again(install: Install) -> None:
    """The cache did not know the compiler: what the first had written was read for ever."""
    for release, ptx in (("12.9", "8.8"), ("13.0", "9.0"), ("12.9", "8.8")):
        install("path", release, ptx)
        made = compile_ptx(STEM, "sm_80")
        assert (made.version, f"by {release}" in made.text) == (ptx, True)


def test_a_release_compiles_once(install: Install, tmp_path: Path) -> None:
    work = f"echo run >> {tmp_path / 'runs'}"
    install("path", "13.0", "9.0", work)
    assert compile_ptx(STEM, "sm_80") == compile_ptx(STEM, "sm_80")
    assert (tmp_path / "runs").read_text() == "run\n"


@pytest.mark.parametrize(("ptx", "read"), [("8.5", True), ("9.0", True), ("9.1", False),
                                           ("10.0", False)])  # fmt: skip
def test_versions_of_ptx_are_numbers(
    install: Install, tmp_path: Path, ptx: str, read: bool
) -> None:
    """PTX 8.x was refused, which every driver of CUDA 13.0 reads; no refused PTX is kept."""
    install("path", "13.0", ptx)
    for _ in range(2):
        if read:
            assert compile_ptx(STEM, "sm_80").version == ptx
            continue
        with pytest.raises(VerificationError, match=f"nvcc wrote PTX {ptx}; drivers of CUDA 13"):
            compile_ptx(STEM, "sm_80")
    assert len([*(tmp_path / "cache").rglob("*.ptx")]) == read


def test_an_endless_nvcc_ends_with_all_that_it_started(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    install("path", "13.0", "9.0", f"sleep 600 & echo $! > {pid}; wait")
    assert find()
    monkeypatch.setattr(nvcc, "PATIENCE", 2.0)
    with pytest.raises(VerificationError, match="did not end within 2 s"):
        compile_ptx(STEM, "sm_80")
    child = Path("/proc") / pid.read_text().strip() / "stat"
    # It ends at once; the test's own time limit ends this loop.
    assert any(not child.exists() or _dead(child) for _ in itertools.count())


def _dead(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_refused_source_is_told_in_its_words(install: Install) -> None:
    install("path", "13.0", "9.0", "echo 'error: no such arch' >&2; exit 1")
    with pytest.raises(
        VerificationError, match=r"nvcc refuses gather_tokens\.cu for sm_80: error: n"
    ):
        compile_ptx(STEM, "sm_80")


def test_a_cache_that_was_emptied_is_filled_again(install: Install, tmp_path: Path) -> None:
    install("path", "13.0", "9.0")
    made = compile_ptx("gather_tokens", "sm_80")
    (kept,) = (tmp_path / "cache" / "effopt" / "ptx").glob("*.ptx")
    kept.write_text("")
    assert compile_ptx("gather_tokens", "sm_80").text == made.text
