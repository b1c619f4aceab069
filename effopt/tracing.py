"""Tracing: the state that a model is traced in, and errors of the trace put in our words."""

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effopt.errors import CaptureError


@contextlib.contextmanager
def as_deployed(model: nn.Module) -> Iterator[None]:
    """Trace a model as it is deployed: in evaluation, without gradients, returning no cache.

    A Hugging Face decoder returns its keys and values for the next token unless `use_cache` is
    off in its config; one forward is captured, so they would be outputs that nobody reads. The
    model and its configs are put back as they were.
    """
    before = [(module, module.training) for module in model.modules()]
    configs = {id(config): config for module in model.modules() if (config := _caching(module))}
    model.eval()
    for config in configs.values():
        config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        for config in configs.values():
            config.use_cache = True
        for module, training in before:
            module.training = training


def _caching(module: nn.Module) -> Any:
    """Return the config of a module that asks for a cache, or None."""
    config = getattr(module, "config", None)
    return config if getattr(config, "use_cache", None) is True else None


@contextlib.contextmanager
def explained(model: nn.Module) -> Iterator[None]:
    """Turn an error of the trace into a CaptureError that names the model's own source line."""
    try:
        yield
    except Exception as error:
        place = _user_line(error)
        reason, remedy = _cause(error)
        raise CaptureError(
            f"{type(model).__name__} cannot be captured{place}: {reason}", remedy
        ) from error


def _user_line(error: BaseException) -> str:
    """Find the innermost frame of the traceback that is not torch's own."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not f.filename.startswith(ours) and Path(f.filename).exists()]
    outside = [f for f in users if "contextlib" not in f.filename]
    return (
        f" at {outside[-1].filename}:{outside[-1].lineno} ({outside[-1].line})" if outside else ""
    )


def _cause(error: BaseException) -> tuple[str, str]:
    """Return what went wrong, in one line, and what to do."""
    text = str(error).strip()
    if fixed := _FIXED.search(text):
        name = fixed[1]
        size = re.search(rf"\b{name} = (\d+)", text)
        held = f" at {size[1]}" if size else ""
        return f"it fixes its {name}{held}", f"leave {name!r} out of dynamic"
    shown = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    known = (remedy for key, remedy in _REMEDIES.items() if key in f"{type(error).__name__} {text}")
    plain = "run the model once on the example inputs, then torch.export.export on it"
    return shown, next(known, plain)


_FIXED = re.compile(r"(?:Constraints violated|Specializations unexpectedly required) \((\w+)\)")
_DATA = "the control flow reads values: use torch.where"
_REMEDIES = {
    "GuardOnDataDependent": _DATA,
    "data-dependent": _DATA,
    "DataDependentOutput": _DATA,
    "Constraints violated": "the model fixes that size: leave it out of dynamic",
    "in output, which is not a known type": "return tensors in tuples, lists, dicts or dataclasses "
    "(a Hugging Face model returns no cache with use_cache=False)",
    "unexpected keyword": "check the names of the example inputs against forward",
    "missing": "pass every required argument of forward in the example inputs",
    "size of tensor": "check the shapes of the example inputs",
    "shape": "check the shapes of the example inputs",
}
"""What the text of an error tells about its cause; the first that fits."""
