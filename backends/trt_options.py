"""What a build of TensorRT may be asked for, and what of the library's API each wish needs.

One row an option, so that 10.x, 11.x and TensorRT-RTX differ in data. An option that the library
at hand lacks is refused with the reason. Run with TensorRT-RTX 1.7 and no GPU: `weight_streaming`,
`workspace`, `level`; `refit` wants a GPU there. Only read, from the 10.16 and 11.4 bindings:
`hardware_compatible`, `timing_cache`. Plans for later versions are not offered: these load by a
runtime that the plan carries, code of its own that no file may run, or by one installed apart.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any

from effopt.errors import UsageError

Value = bool | int | str
Options = Mapping[str, Value]


@dataclass(frozen=True)
class Option:
    """One wish: `apply(trt, config, value)` sets it, if `trt` has all names that it `needs`.

    `takes` is the type of its values, or the range of the numbers that it takes.
    `not_rtx` says why TensorRT-RTX gets no such wish, though its API has the names.
    """

    needs: tuple[str, ...]
    apply: Callable[[Any, Any, Any], None]
    not_rtx: str = ""
    takes: type | range = bool


def complaint(name: str, value: Value) -> str:
    """Return why there is no such option, or why it takes no such value, or ""."""
    if name not in OPTIONS:
        return f"there is no option {name[:100]!a}"
    takes = OPTIONS[name].takes
    if isinstance(takes, range):
        known = f"numbers from {takes[0]} to {takes[-1]}"
        fits = type(value) is int and value in takes
    else:
        known, fits = f"a {takes.__name__}", type(value) is takes
    return "" if fits else f"option {name!r} takes {known}, not {value!a:.100}"


def check_options(options: Options) -> None:
    """Raise UsageError for an option that there is not, or a value that it does not take.

    A file must be one that can be written: to find that out after the build would lose it.
    """
    for name, value in options.items():
        if wrong := complaint(name, value):
            raise UsageError(wrong, f"known options: {', '.join(OPTIONS)}")
        if name in PATHS and (wrong := _irreplaceable(Path(str(value)))):
            reason = f"option {name!r}: {str(value)!a:.200} cannot be read and replaced: {wrong}"
            raise UsageError(reason, "give a file of yours, new or of an earlier build")


def _irreplaceable(path: Path) -> str:
    """Return why a file, which need not be there, cannot be read and then replaced; or ""."""
    try:
        if not path.parent.is_dir():
            return f"there is no folder {path.parent}"
        if path.exists() and not (path.is_file() and os.access(path, os.R_OK)):
            return "it is no file, or one of others"
    except OSError as error:  # a folder that may not be looked into, or a name that is too long
        return str(error.strerror)
    writable = os.access(path.parent, os.W_OK | os.X_OK)
    return "" if writable else f"{path.parent} takes no new files"


def refusal(trt: Any, name: str) -> str:
    """Return why the library does not take an option, or ""."""
    option, title = OPTIONS[name], f"{trt.__name__} {trt.__version__}"
    if option.not_rtx and "rtx" in trt.__name__:
        return f"{title} takes no option {name!r}: {option.not_rtx}"
    lacking = [need for need in option.needs if not has(trt, need)]
    return f"{title} takes no option {name!r}: it has no {lacking[0]}" if lacking else ""


def has(trt: Any, path: str) -> bool:
    """Tell whether a module has a dotted name, such as "BuilderFlag.REFIT"."""
    absent = object()
    found = reduce(lambda value, part: getattr(value, part, absent), path.split("."), trt)
    return found is not absent


def _flags(*names: str) -> Option:
    def apply(trt: Any, config: Any, value: Any) -> None:
        for name in names:
            config.set_flag(getattr(trt.BuilderFlag, name))

    return Option(tuple(f"BuilderFlag.{name}" for name in names), apply)


def _ampere(trt: Any, config: Any, value: Any) -> None:
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _workspace(trt: Any, config: Any, value: Any) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, value << 20)


def _level(trt: Any, config: Any, value: Any) -> None:
    config.builder_optimization_level = value


def _timing_cache(trt: Any, config: Any, value: Any) -> None:
    path = Path(value)
    data = path.read_bytes() if path.exists() else b""
    config.set_timing_cache(config.create_timing_cache(data), False)


def keep_timing_cache(config: Any, path: Path) -> None:
    """Write the timings that a build has added, whole or not at all."""
    data = bytes(config.get_timing_cache().serialize())
    descriptor, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with open(descriptor, "wb") as file:
        file.write(data)
    os.replace(fresh, path)


_LEVELS = range(6)
_MEBIBYTES = range(1 << 43)
"""Of which the bytes are a 64-bit number."""

OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        "hardware_compatible": Option(
            ("HardwareCompatibilityLevel.AMPERE_PLUS",),
            _ampere,
            "its plans are for the architectures that they name",
        ),
        "weight_streaming": _flags("WEIGHT_STREAMING"),
        "refit": Option(
            ("BuilderFlag.REFIT", "Refitter", "OnnxParserRefitter"), _flags("REFIT").apply
        ),
        "workspace": Option(
            ("IBuilderConfig.set_memory_pool_limit", "MemoryPoolType.WORKSPACE"),
            _workspace,
            takes=_MEBIBYTES,
        ),
        "level": Option(("IBuilderConfig.builder_optimization_level",), _level, takes=_LEVELS),
        "timing_cache": Option(
            ("IBuilderConfig.create_timing_cache", "IBuilderConfig.set_timing_cache"),
            _timing_cache,
            "it times nothing while it builds",
            takes=str,
        ),
    }
)
PATHS = frozenset(name for name, option in OPTIONS.items() if option.takes is str)
"""Options that are files of this machine: no engine records them."""
"""By name: `workspace` is in MiB, `level` from 0 (quick) to 5, `timing_cache` a path; the others
are yes or no. `refit` may change the numbers of a TensorRT 11.3 engine (its release notes)."""
