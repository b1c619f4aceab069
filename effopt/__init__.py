"""effopt: a compiler-style graph-rewrite optimizer for transformer inference.

>>> optimized = effopt.optimize(model, target="cpu")
>>> optimized.save("out/")
>>> engine = effopt.load("out/")

Importing effopt is light: what needs torch is imported when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effopt import passes as passes
    from effopt.engine import Engine as Engine
    from effopt.engine import load as load
    from effopt.errors import CaptureError as CaptureError
    from effopt.errors import EffoptError as EffoptError
    from effopt.errors import MissingError as MissingError
    from effopt.errors import PreconditionError as PreconditionError
    from effopt.errors import UnsafeFileError as UnsafeFileError
    from effopt.errors import UsageError as UsageError
    from effopt.errors import VerificationError as VerificationError
    from effopt.explanation import Explanation as Explanation
    from effopt.explanation import explain as explain
    from effopt.optimizer import Optimized as Optimized
    from effopt.optimizer import optimize as optimize
    from effopt.report import Report as Report
    from effopt.tables import recipes as recipes
    from effopt.tables import targets as targets

_HOME = {
    **dict.fromkeys(("Engine", "load"), "effopt.engine"),
    **dict.fromkeys(
        (
            *("CaptureError", "EffoptError", "MissingError", "PreconditionError"),
            *("UnsafeFileError", "UsageError", "VerificationError"),
        ),
        "effopt.errors",
    ),
    **dict.fromkeys(("Explanation", "explain"), "effopt.explanation"),
    **dict.fromkeys(("Optimized", "optimize"), "effopt.optimizer"),
    **dict.fromkeys(("recipes", "targets"), "effopt.tables"),
    "Report": "effopt.report",
}
"""Public name → the module that holds it, imported on first use."""

__all__ = sorted([*_HOME, "passes"])


def __getattr__(name: str) -> Any:
    if name == "passes":
        return importlib.import_module("effopt.passes")
    if name not in _HOME:
        raise AttributeError(f"module 'effopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
