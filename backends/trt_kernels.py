"""The kernels of an engine folder: PTX of the plugins that its ONNX files name.

It is compiled where nvcc is, for the architecture of the target, and built into engines; an engine
that is built needs it no more.
"""

from collections.abc import Iterable
from pathlib import Path

from effopt.backends.nvcc import available, compile_ptx
from effopt.backends.onnx_plugins import plugins


def ptx_file(stem: str, arch: str) -> str:
    """Return the name of the file with the PTX of a kernel."""
    return f"{stem}.{arch}.ptx"


def ptx_files(folder: Path, names: Iterable[str], arch: str) -> dict[str, Path]:
    """Return the PTX that a folder has of plugins for an architecture, by the stems of the sources.

    A file of any other name counts for nothing.
    """
    found = {stem: folder / ptx_file(stem, arch) for stem in _stems(names)}
    return {stem: path for stem, path in found.items() if path.is_file()}


def write_kernels(folder: Path, names: Iterable[str], arch: str) -> tuple[list[str], str]:
    """Write the PTX of plugins, by the names of their nodes; return the files and what is pending.

    Without nvcc nothing is written, and what is pending says so: engines can be built all the same,
    where the functions in the files stand for the plugins. Errors are those of `compile_ptx`.
    """
    stems = _stems(names)
    if not stems:
        return [], ""
    here = available()
    if not here.ok:
        return [], f"kernels: {', '.join(stems)} to be compiled for {arch} ({here.reason})"
    for stem in stems:
        (folder / ptx_file(stem, arch)).write_text(compile_ptx(stem, arch).text)
    return [ptx_file(stem, arch) for stem in stems], ""


def renew_kernels(folder: Path, names: Iterable[str], arch: str) -> None:
    """Compile the PTX of plugins in place of all that a folder has; errors as `write_kernels`.

    Without nvcc the folder's own stays, of these plugins for this architecture.
    """
    found = sorted(names)
    kept = [] if available().ok else ptx_files(folder, found, arch).values()
    for path in {*folder.glob("*.ptx")}.difference(kept):
        path.unlink()
    write_kernels(folder, found, arch)


def _stems(names: Iterable[str]) -> list[str]:
    return sorted({plugins()[name].stem for name in names})
