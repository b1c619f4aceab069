"""Compiling CUDA sources to PTX, without a GPU or a driver.

PTX of one architecture runs on every later one. nvcc is the first that is not too new: of the
package nvidia-cuda-nvcc (13.0), whose parts find each other, of CUDA_HOME, or of the path.
"""

import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import cast

from effopt.backend import YES, Support
from effopt.errors import MissingError, VerificationError

SOURCES = Path(__file__).resolve().parent / "kernels"
HEADER = "effopt.cuh"
PTX_VERSION = "9.0"
"""The newest PTX that a driver of CUDA 13.0 reads; it reads all that are older."""
RELEASE = "13.0"
"""The newest nvcc that is used: a later one writes PTX that such a driver refuses."""
PATIENCE = 300.0
"""Seconds that nvcc may take for one source."""

_OPTIONS = ("-O3", "--std=c++17")
_PACKAGE = Path("nvidia") / "cu13" / "bin" / "nvcc"
_REMEDY = "pip install 'effopt[nvcc]', and a C++ compiler beside it"
_AT_FAULT = f"check that nvcc is of release {RELEASE} and that g++ is one that it takes"


@dataclass(frozen=True)
class Entry:
    """One kernel in PTX: its name, and its parameters' types, such as "u64" for a pointer."""

    name: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Ptx:
    """The PTX of one source for one architecture."""

    text: str

    @property
    def version(self) -> str:
        """The version of the PTX language."""
        return self._word("version")

    @property
    def target(self) -> str:
        """The least architecture that runs it, such as "sm_80"."""
        return self._word("target")

    def entries(self) -> Mapping[str, Entry]:
        """Return the kernels by name."""
        found = re.findall(r"\.visible \.entry (\w+)\((.*?)\)", self.text, re.DOTALL)
        made = {n: Entry(n, tuple(re.findall(r"\.param \.(\w+)", body))) for n, body in found}
        return MappingProxyType(made)

    def is_for(self, arch: str) -> bool:
        """Tell whether it says that it is for an architecture, as an empty file does not."""
        return re.search(rf"^\.target {arch}\b", self.text, re.MULTILINE) is not None

    def _word(self, name: str) -> str:
        found = re.search(rf"^\.{name} ([\w.]+)", self.text, re.MULTILINE)
        if found is None:
            raise VerificationError(f"the PTX has no .{name}", "compile it again")
        return found[1]


def find() -> Path | None:
    """Return the first nvcc of this machine that is not too new, or None."""
    return next((place for place in _places() if not _unfit(place)), None)


def available() -> Support:
    """Tell whether CUDA sources can be compiled here."""
    lacking = missing()
    return Support(False, ": ".join(lacking)) if lacking else YES


def missing() -> tuple[str, str] | None:
    """Return what lacks to compile CUDA sources here, and what to do about it, or None."""
    if find() is None:
        unfit = [reason for place in _places() if (reason := _unfit(place))]
        return (unfit or ["nvcc is not installed"])[0], _REMEDY
    return ("nvcc needs a C++ compiler", "install g++") if shutil.which("g++") is None else None


@functools.cache
def release(nvcc: Path) -> str:
    """Return the release of an nvcc, such as "13.0", or "" where it tells none."""
    try:
        said = _said([str(nvcc), "--version"])
    except VerificationError:  # `missing` says that it tells none
        return ""
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else ""


def _places() -> list[Path]:
    """Return each nvcc that is here: that of the package, of CUDA_HOME, of the path."""
    home, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    places = [Path(sysconfig.get_path("purelib")) / _PACKAGE]
    places += [Path(home) / "bin" / "nvcc"] if home else []
    places += [Path(on_path)] if on_path else []
    return [place for place in places if place.is_file()]


def _unfit(nvcc: Path) -> str:
    """Return why an nvcc is passed over, or ""."""
    found = release(nvcc)
    if not found:
        return f"{nvcc} does not tell its release"
    if _numbers(found) > _numbers(RELEASE):
        return f"{nvcc} is of release {found}, whose PTX drivers of CUDA {RELEASE} do not read"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """Return (9, 0) for "9.0"; versions are ordered as these are."""
    return tuple(int(word) for word in version.split("."))


def compile_ptx(stem: str, arch: str) -> Ptx:
    """Return the PTX of a kernel's source for an architecture such as "sm_80", from a cache.

    Raises MissingError where no nvcc is here that is not too new, VerificationError with its words
    where it refuses the source, and where it writes PTX above PTX_VERSION or does not end.
    """
    if lacking := missing():
        raise MissingError(*lacking)
    nvcc = cast(Path, find())
    source, header = ((SOURCES / name).read_bytes() for name in (f"{stem}.cu", HEADER))
    asked = " ".join((*_OPTIONS, arch, release(nvcc))).encode()
    key = hashlib.sha256(b"\0".join([source, header, asked]))
    kept = _cache() / f"{stem}.{arch}.{key.hexdigest()[:16]}.ptx"
    if kept.exists() and (found := Ptx(kept.read_text())).is_for(arch):
        return found
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        made = Path(scratch) / "out.ptx"
        _run(nvcc, SOURCES / f"{stem}.cu", arch, made)
        found = Ptx(made.read_text())
        if _numbers(found.version) > _numbers(PTX_VERSION):  # kept, it would be read for ever
            reason = f"nvcc wrote PTX {found.version}; drivers of CUDA {RELEASE} read {PTX_VERSION}"
            raise VerificationError(reason, _REMEDY)
        made.replace(kept)
    return found


def _run(nvcc: Path, source: Path, arch: str, into: Path) -> None:
    virtual = arch.replace("sm_", "compute_")
    words = [str(nvcc), "-ptx", f"-arch={virtual}", *_OPTIONS, "-o", str(into), str(source)]
    try:
        _said(words)
    except VerificationError as error:
        reason = f"nvcc refuses {source.name} for {arch}: {error.reason}"
        raise VerificationError(reason, _AT_FAULT) from error


def _said(words: Sequence[str]) -> str:
    """Run a program and return what it prints; VerificationError where it fails or does not end.

    All that it has started ends with it, after PATIENCE seconds or at Ctrl-C.
    """
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise VerificationError(f"it cannot be run ({error.strerror})") from error
    with process:
        try:
            said, wrong = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise VerificationError(f"it did not end within {PATIENCE:.0f} s") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = (wrong or said).strip().splitlines()
        raise VerificationError(lines[0] if lines else "no message")
    return said


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "effopt" / "ptx"
