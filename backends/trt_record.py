"""What a manifest says of built plans, as the fact "engine"; read with care, free of torch."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effopt.backends.trt_modules import LIBRARIES, Card, number
from effopt.backends.trt_options import PATHS, Options, complaint
from effopt.errors import UnsafeFileError

_PLAN = re.compile(r"[A-Za-z0-9_-]{1,100}\.plan")
_ARCH = re.compile(r"sm_[0-9]{2,3}")
_AMPERE = 80
_AGAIN = "build the engine again with effopt build"


@dataclass(frozen=True)
class Engine:
    """Plans that a library of this version built for a GPU of this architecture.

    `plans` maps each ONNX file to its plan; `sizes` are least, best and largest of each size that
    was left open; `options` are what was asked of the build. `layers` and `plugins` count over all
    plans, `seconds` is what the build took; `note` says why functions stand for plugins, or "".
    """

    library: str
    version: str
    arch: str
    device: str
    plans: Mapping[str, str]
    sizes: Mapping[str, tuple[int, int, int]]
    options: Options
    layers: int
    plugins: int
    seconds: float
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the plain record."""
        return asdict(self)

    def unfit(self, version: str, card: Card) -> str:
        """Return why the plans cannot run in a library of a version on a GPU, or ""."""
        title = LIBRARIES[self.library].title
        portable = self.options.get("hardware_compatible") and card.number >= _AMPERE
        if card.arch != self.arch and not (portable and number(self.arch) >= _AMPERE):
            return f"its engine was built for {self.arch}, this GPU is {card.arch}"
        if version != self.version:
            return f"its engine was built by {title} {self.version}, here is {version}"
        return ""


def read_engine(record: object, folder: Path, files: list[str]) -> Engine:
    """Read the record of a folder with these ONNX files; UnsafeFileError for one that is damaged.

    Plan names cannot leave the folder, and every file has its plan.
    """
    if not isinstance(record, Mapping):
        raise _damaged("it is no mapping")
    try:
        engine = Engine(
            str(record["library"]),
            str(record["version"]),
            str(record["arch"]),
            str(record["device"]),
            {str(name): str(plan) for name, plan in record["plans"].items()},
            {str(name): _sizes(found) for name, found in record["sizes"].items()},
            {str(name): _value(value) for name, value in record["options"].items()},
            int(record["layers"]),
            int(record["plugins"]),
            float(record["seconds"]),
            str(record.get("note", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(f"{error!s:.100}") from error
    _check(engine, folder, files)
    return engine


def _check(engine: Engine, folder: Path, files: list[str]) -> None:
    if engine.library not in LIBRARIES or not _ARCH.fullmatch(engine.arch):
        raise _damaged("its library or its architecture is unknown")
    for name, value in engine.options.items():
        if wrong := complaint(name, value):
            raise _damaged(wrong)
        if name in PATHS:  # a build writes there, and no file chooses what is written
            raise _damaged(f"option {name!r} is none that is kept")
    if sorted(engine.plans) != sorted(files):
        raise _damaged("its plans are not those of the ONNX files")
    for plan in engine.plans.values():
        if not _PLAN.fullmatch(plan) or not (folder / plan).is_file():
            raise _damaged(f"there is no plan {plan[:100]!a}")


def _sizes(record: Any) -> tuple[int, int, int]:
    least, best, most = (int(size) for size in record)
    return least, best, most


def _value(value: Any) -> bool | int | str:
    if not isinstance(value, (bool, int, str)):
        raise TypeError(f"an option holds a {type(value).__name__}")
    return value


def _damaged(what: str) -> UnsafeFileError:
    return UnsafeFileError(f"the record of the built engine is damaged: {what}", _AGAIN)
