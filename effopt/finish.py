"""finish: the engine of a folder, built on the machine that has the device.

`Optimized.save` writes a folder on any machine; what only the device's machine can do is done
here. The folder is replaced whole, once its engine has given the stored outputs, or not at all.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

from effopt import folder as folders
from effopt.backend import Backend, backend
from effopt.engine import Engine, Figure, check
from effopt.errors import MissingError, UnsafeFileError, UsageError, VerificationError
from effopt.folder import Manifest
from effopt.report import Report
from effopt.target import Target, target

REPORT = "report.json"
ENGINE = "engine"
"""The fact that tells of a built engine: its `sizes` and `options` are those of a `Wish`."""
_MOST = 64 << 20

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """What is asked of a build: `sizes` to build for by name, and the backend's own `options`.

    `old` is a folder whose engine is taken as it is, and gets this folder's weights.
    """

    sizes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    options: Mapping[str, bool | int | str] = field(default_factory=dict)
    old: Path | None = None


class Finisher(Backend, Protocol):
    """A backend whose engines are built on the machine that runs them."""

    def ready(self, target: Target) -> None:
        """Raise MissingError where this machine cannot build and run engines for the target."""
        ...

    def finish(
        self, folder: Path, manifest: Manifest, wish: Wish, tell: Tell
    ) -> tuple[dict[str, Any], str]:
        """Build into a folder, and return what to change in its facts, and a line about it."""
        ...

    def write_plugins(self, folder: Path, target: Target) -> list[str]:
        """Write the sources of all plugins for a target, to compile apart; return their names."""
        ...

    def compile_check(
        self, folder: Path, manifest: Manifest, wish: Wish, tell: Tell
    ) -> tuple[dict[str, Any], str]:
        """Build as far as this machine can and keep nothing; return figures, and a line."""
        ...


@dataclass(frozen=True)
class Finished:
    """A folder whose engine is built: its facts, a line about them, and how it was checked."""

    folder: Path
    facts: Mapping[str, Any]
    line: str
    figures: tuple[Figure, ...]


def finish(path: Path, wish: Wish, name: str = "", tell: Tell = lambda stage: None) -> Finished:
    """Build the engine of a folder with its backend, or the one named; check it, and put it there.

    Raises UsageError for a folder with nothing to build, MissingError where the library, the
    device or its architecture is missing, PreconditionError where the graph is refused, and
    VerificationError where the engine's numbers are wrong. The folder is then as it was.
    """
    tell("check files")
    vendor, made_for, _ = _opened(path, name)
    vendor.ready(made_for)
    found: list[tuple[dict[str, Any], str, list[Figure]]] = []

    def fill(fresh: Path) -> Manifest:
        for item in sorted(path.iterdir()):
            shutil.copyfile(item, fresh / item.name, follow_symlinks=False)
        manifest = folders.read(fresh)  # the copies are checked, not what they were made of
        facts, line = vendor.finish(fresh, manifest, wish, tell)
        made = replace(manifest, backend=vendor.name, facts={**manifest.facts, **facts}, pending="")
        tell("check numbers")
        figures = _checked(Engine(fresh, made, vendor.load(fresh, made.signature, made.facts)))
        _report(fresh, line)
        found.append((facts, line, figures))
        return made

    written = folders.write(path, fill)
    facts, line, figures = found[0]
    return Finished(written, facts, line, tuple(figures))


def finish_like(path: Path, manifest: Mapping[str, Any], tell: Tell = lambda stage: None) -> Path:
    """Build the engine of a folder as that of another was built, whose manifest is given.

    So two folders can be compared: the same backend, options and sizes.
    """
    built = manifest["facts"][ENGINE]
    sizes = {name: (size[0], size[1], size[2]) for name, size in built["sizes"].items()}
    wish = Wish(sizes, dict(built["options"]))
    return finish(path, wish, str(manifest["backend"]), tell).folder


def compile_check(
    path: Path, wish: Wish, name: str = "", tell: Tell = lambda stage: None
) -> tuple[dict[str, Any], str]:
    """Try as much of a build as this machine can, and keep nothing of it; errors as `finish`."""
    tell("check files")
    vendor, _, manifest = _opened(path, name)
    return vendor.compile_check(path, manifest, wish, tell)


def _opened(path: Path, name: str) -> tuple[Finisher, Target, Manifest]:
    manifest = folders.read(path)
    made_for = target(manifest.target)
    if not made_for.gpu:
        reason = f"{path} was made for {manifest.target!r}: there is nothing left to build"
        raise UsageError(reason, "convert the model with --target a100, or another GPU")
    return finisher(name or made_for.backend), made_for, manifest


def finisher(name: str) -> Finisher:
    """Return the backend of a GPU target, by its name; UsageError for one that builds nothing."""
    found = backend(name)
    if not hasattr(found, "finish"):
        raise UsageError(f"the backend {name!r} builds no engines", "name that of a GPU target")
    return cast(Finisher, found)


def _checked(engine: Engine) -> list[Figure]:
    if engine.note:
        reason = f"the engine was built, and does not load: {engine.note}"
        raise MissingError(reason, "look at effopt build --json with --debug")
    figures = check(engine)
    for figure in figures:
        if not figure.ok:
            raise VerificationError(
                f"output {figure.output!r} of the built engine differs from eager torch by "
                f"{figure.difference:.2e} of its largest value, more than {figure.tolerance:.0e}",
                "this is a defect of the engine: please report the model, the GPU and the versions",
            )
    return figures


def _report(fresh: Path, line: str) -> None:
    """Say in the report of a folder, where it has one, that nothing is pending any more."""
    if not (fresh / REPORT).exists():
        return
    try:
        record = json.loads(folders.read_file(fresh, REPORT, _MOST))
    except ValueError as error:
        raise UnsafeFileError(f"{REPORT} is damaged: it is no JSON", "convert again") from error
    report = Report.from_json(record)
    sizes = {item.name: item.stat().st_size for item in sorted(fresh.iterdir())}
    files = {name: size for name, size in sizes.items() if name != folders.MANIFEST}
    report = replace(report, pending="", files=files, notes=(*report.notes, line))
    (fresh / REPORT).write_text(json.dumps(report.to_json(), indent=1))
    (fresh / "report.html").write_text(report.html(), encoding="utf-8")
