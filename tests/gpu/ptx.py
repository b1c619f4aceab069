"""PTX for the GPU at hand: compiled here, or carried there in a folder that EFFOPT_PTX names.

    python -m tests.gpu.ptx FOLDER sm_90

writes that folder on a machine that has nvcc.
"""

import os
import sys
from pathlib import Path

from effopt.backends import nvcc
from effopt.backends.onnx_plugins import plugins
from effopt.backends.trt_kernels import ptx_file

FOLDER = "EFFOPT_PTX"


def ptx_of(stem: str, arch: str) -> str:
    """Return the PTX of a source; MissingError where it is neither carried nor can be compiled."""
    carried = Path(os.environ.get(FOLDER, "")) / ptx_file(stem, arch)
    return carried.read_text() if carried.is_file() else nvcc.compile_ptx(stem, arch).text


def lacking(arch: str) -> str:
    """Say why some kernel has no PTX here, or ""."""
    stems = sorted({plugin.stem for plugin in plugins().values()})
    carried = Path(os.environ.get(FOLDER, ""))
    if all((carried / ptx_file(stem, arch)).is_file() for stem in stems):
        return ""
    return nvcc.available().reason


def main(folder: str, arch: str) -> None:
    """Write the PTX of every kernel."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for stem in sorted({plugin.stem for plugin in plugins().values()}):
        (Path(folder) / ptx_file(stem, arch)).write_text(nvcc.compile_ptx(stem, arch).text)


if __name__ == "__main__":
    main(*sys.argv[1:3])
