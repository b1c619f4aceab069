"""A machine with a GPU and TensorRT, of stand-ins: the process that builds is the true one.

Its library is `tests.trt_fake`; plans are run by onnxruntime, from the ONNX files beside them.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from effopt.backends import trt, trt_modules, trt_plans, trt_runner
from effopt.backends.session import Session
from effopt.backends.trt_modules import Card
from effopt.errors import MissingError
from effopt.signature import Signature
from tests.trt_fake import Fake

ROOT = Path(__file__).parent.parent
VERSION = "10.16.1.11"
_MODULE = """
import sys
from tests.trt_fake import Fake
fake = Fake({version!r})
fake.__dict__.update({changes!r})
sys.modules[__name__] = fake
"""


class Machine:
    """What is installed on a machine, and which GPU it has; a test changes it as it goes."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self._patch, self._folder = patch, folder
        self.installed: dict[str, str] = {}
        for module in (trt, trt_modules, trt_plans):
            patch.setattr(module, "card", self._card)
            patch.setattr(module, "installed", self.installed.get, raising=False)
        patch.setattr(trt_runner, "TrtRunner", self._runner)
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
        self.gpu: Card | None = None
        self.wrong = False
        """Whether plans give other numbers than their files."""

    def library(self, version: str = VERSION, **changes: Any) -> None:
        """Install TensorRT; `changes` are to the stand-in, such as its parser's errors."""
        code = _MODULE.format(version=version, changes=changes)
        (self._folder / "tensorrt.py").write_text(code)
        self._patch.setitem(sys.modules, "tensorrt", Fake(version))
        self.installed["trt"] = "tensorrt"

    def card(self, arch: str = "sm_80") -> None:
        """Put a GPU in, or another in its place."""
        self.gpu = Card(arch, "NVIDIA A100")

    def _card(self) -> Card:
        if self.gpu is None:
            raise MissingError("no NVIDIA driver on this machine", "run this where the GPU is")
        return self.gpu

    def _runner(self, plan: Path, signature: Signature, module: str) -> Any:
        assert plan.read_bytes().startswith(b"plan")
        assert module == "tensorrt"
        session = Session(plan.with_suffix(".onnx"), signature)
        plain = session.run
        if self.wrong:
            session.run = lambda inputs: [2 * x for x in plain(inputs)]  # type: ignore[method-assign]
        return session
