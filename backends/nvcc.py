"""Compiling CUDA sources to PTX, without a GPU or a driver.

PTX of one architecture runs on every later one. nvcc is that of CUDA_HOME, of the path, or of the
package nvidia-cuda-nvcc (13.0), whose parts find each other.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from effopt.backend import YES, Support
from effopt.errors import MissingError, VerificationError

SOURCES = Path(__file__).resolve().parent / "kernels"
HEADER = "effopt.cuh"
PTX_VERSION = "9.0"
"""The PTX that a driver of CUDA 13.0 reads; a newer nvcc writes a newer one, which it refuses."""

_OPTIONS = ("-O3", "--std=c++17")
_PACKAGE = Path("nvidia") / "cu13" / "bin" / "nvcc"
_REMEDY = "pip install 'effopt[nvcc]', and a C++ compiler beside it"


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

    def _word(self, name: str) -> str:
        found = re.search(rf"^\.{name} ([\w.]+)", self.text, re.MULTILINE)
        if found is None:
            raise VerificationError(f"the PTX has no .{name}", "compile it again")
        return found[1]


def find() -> Path | None:
    """Return the nvcc of this machine, or None."""
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else []
    places.append(Path(sysconfig.get_path("purelib")) / _PACKAGE)
    return next((place for place in places if place.is_file()), None)


def available() -> Support:
    """Tell whether CUDA sources can be compiled here."""
    if find() is None:
        return Support(False, f"nvcc is not installed: {_REMEDY}")
    if shutil.which("g++") is None:
        return Support(False, "nvcc needs a C++ compiler: install g++")
    return YES


def compile_ptx(stem: str, arch: str) -> Ptx:
    """Return the PTX of a kernel's source for an architecture such as "sm_80", from a cache.

    Raises MissingError where nvcc is not installed, VerificationError with its words where it
    refuses the source or writes PTX of another version than PTX_VERSION.
    """
    here = available()
    if not here.ok:
        raise MissingError(*here.reason.split(": ", 1))
    source, header = ((SOURCES / name).read_bytes() for name in (f"{stem}.cu", HEADER))
    key = hashlib.sha256(b"\0".join([source, header, " ".join((*_OPTIONS, arch)).encode()]))
    kept = _cache() / f"{stem}.{arch}.{key.hexdigest()[:16]}.ptx"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            made = Path(scratch) / "out.ptx"
            _run(SOURCES / f"{stem}.cu", arch, made)
            made.replace(kept)
    found = Ptx(kept.read_text())
    if found.version != PTX_VERSION:
        reason = f"nvcc wrote PTX {found.version}; drivers of CUDA 13.0 read up to {PTX_VERSION}"
        raise VerificationError(reason, "install nvcc 13.0, as in effopt[nvcc]")
    return found


def _run(source: Path, arch: str, into: Path) -> None:
    virtual = arch.replace("sm_", "compute_")
    words = [str(find()), "-ptx", f"-arch={virtual}", *_OPTIONS, "-o", str(into), str(source)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = f"nvcc refuses {source.name} for {arch}: {lines[0] if lines else 'no message'}"
        raise VerificationError(reason, "check that nvcc is 13.0 and that g++ is one that it takes")


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "effopt" / "ptx"
