"""The plans of a folder: one for each ONNX file, asked for with one wish."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from effopt.backends.onnx import MODEL
from effopt.backends.onnx_check import check_file
from effopt.backends.split_record import read_split
from effopt.backends.trt_build import PARSING, Outcome, Request, ask
from effopt.backends.trt_modules import (
    LIBRARIES,
    Card,
    card,
    installed,
    missing,
    module_name,
    number,
)
from effopt.backends.trt_options import PATHS, check_options
from effopt.backends.trt_profiles import profiles, ranges, read_sizes
from effopt.backends.trt_record import Engine, read_engine
from effopt.errors import MissingError, UsageError
from effopt.finish import ENGINE, Tell, Wish
from effopt.folder import read as read_folder
from effopt.signature import Signature

AIMS = (75, 80, 86, 89, 120)
"""Architectures that TensorRT-RTX 1.7 builds for without a GPU."""
CHECKER = "trt-rtx"
"""The library that parses and builds without a GPU."""

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """The ONNX files of a folder: its signature and facts say what they are."""

    folder: Path
    signature: Signature
    facts: Facts

    @property
    def parts(self) -> list[tuple[str, Signature]]:
        """Each file with what it takes and gives; UnsafeFileError for a damaged record."""
        if "split" not in self.facts:
            return [(MODEL, self.signature)]
        split = read_split(self.facts["split"], self.signature, self.folder)
        return [(part.file, part.signature) for part in split.segments]

    def engine(self) -> Engine | None:
        """Return what is said of built plans; UnsafeFileError for a damaged record."""
        if ENGINE not in self.facts:
            return None
        return read_engine(self.facts[ENGINE], self.folder, [file for file, _ in self.parts])


def parse(path: Path) -> str:
    """Parse a file where a library is here that needs no GPU for it; raise where it refuses.

    Returns why it was not parsed where that library is here and does not load, else "".
    """
    module = installed(CHECKER)
    if module is None:
        return ""
    found = ask(Request(module, path), PARSING)
    if found.kind == "library":  # it only checks: without it the file is as good
        return f"not parsed: {found.reason}"
    found.require(path.name)
    return ""


def build(kind: str, model: Model, wish: Wish, tell: Tell) -> Engine:
    """Build the plan of each file, for the GPU that is here, beside the file.

    Raises what `Outcome.require` does where a file is refused.
    """
    here = card()
    if wish.old is not None:
        return _refitted(kind, model, wish.old, here, tell)
    found = _built(kind, here.arch, model, model.folder, wish, tell)
    sizes = ranges(read_sizes(model.facts.get("sizes", {})), wish.sizes)
    kept = {name: value for name, value in wish.options.items() if name not in PATHS}
    return _engine(kind, here, found, sizes, kept)


def compile_check(
    kind: str, arch: str, model: Model, wish: Wish, tell: Tell
) -> tuple[dict[str, Any], str]:
    """Build where this library can, else with TensorRT-RTX for the nearest GPU; keep nothing.

    Returns the figures, and a line about them; it says where the GPU is another than asked for.
    Raises MissingError where no library here builds without a GPU.
    """
    lacking = missing(kind)
    fits = lacking is None and card().arch == arch
    used = kind if fits else CHECKER
    aim = arch if fits else nearest(arch)
    if installed(used) is None:
        reason = lacking[0] if lacking else f"this GPU is not {arch}"
        raise MissingError(reason, f"{LIBRARIES[CHECKER].install}, which builds without a GPU")
    with tempfile.TemporaryDirectory(prefix="effopt-") as scratch:
        found = _built(used, aim, model, Path(scratch), wish, tell)
    figures = {"library": used, "arch": aim, **_sums(found)}
    figures["warnings"] = [line for outcome in found.values() for line in outcome.warnings]
    other = "" if aim == arch else f", the nearest that it knows to {arch}"
    title = f"{LIBRARIES[used].title} {figures['version']}"
    line = f"{title} builds it for {aim}{other}: {figures['layers']} layers"
    if note := _notes(found.values()):
        line = f"{line}; {note}"
    return figures, f"{line}; a compile check, whose plans were thrown away"


def nearest(arch: str) -> str:
    """Return the largest architecture that TensorRT-RTX knows and that is not above another."""
    return f"sm_{max((aim for aim in AIMS if aim <= number(arch)), default=AIMS[0])}"


def _plugins(model: Model, path: Path, arch: str) -> tuple[dict[str, int], dict[str, Path]]:
    """Return the plugin nodes of a file, and the PTX of their kernels for an architecture."""
    from effopt.backends.onnx_plugins import plugin_nodes  # they need torch, running a plan none
    from effopt.backends.trt_kernels import ptx_files

    nodes = plugin_nodes([path])
    return nodes, ptx_files(model.folder, nodes, arch)


def _notes(outcomes: Iterable[Outcome]) -> str:
    """Return why functions stand for plugins in some plan, or ""."""
    found = sorted({outcome.note for outcome in outcomes if outcome.note})
    return "; ".join(f"functions stand for its plugins: {note}" for note in found)


def _built(
    kind: str, arch: str, model: Model, into: Path, wish: Wish, tell: Tell
) -> dict[str, Outcome]:
    check_options(wish.options)
    archs = (arch,) if LIBRARIES[kind].aims else ()
    chosen = ranges(read_sizes(model.facts.get("sizes", {})), wish.sizes)
    shapes = {file: profiles(part, chosen, file) for file, part in model.parts}
    module = module_name(kind)

    def request(file: str) -> Request:
        plan = (into / file).with_suffix(".plan")
        path = model.folder / file
        more = (shapes[file], wish.options, None, *_plugins(model, path, arch))
        return Request(module, path, plan, archs, *more)

    return _each(model, "build", request, tell)


def _refitted(kind: str, model: Model, old: Path, here: Card, tell: Tell) -> Engine:
    """Put the weights of each file into the plan that an old folder has of the same file.

    Not run: it needs a GPU.
    """
    manifest = read_folder(old)
    before = Model(old, manifest.signature, manifest.facts).engine()
    reason = _no_refit(kind, before, model, here)
    if before is None or reason:
        raise UsageError(f"{old} gives no engine to refit: {reason}", "build without --refit-from")
    module = module_name(kind)

    def request(file: str) -> Request:
        path = model.folder / file
        plan, held = path.with_suffix(".plan"), old / before.plans[file]
        # Where functions stand for plugins in the old plan, they do in the new one.
        nodes, ptx = ({}, {}) if before.note else _plugins(model, path, here.arch)
        return Request(module, path, plan, old=held, plugins=nodes, ptx=ptx)

    found = _each(model, "refit", request, tell)
    made = _engine(kind, here, found, before.sizes, before.options)
    return replace(made, plugins=before.plugins, note=before.note)


def _no_refit(kind: str, before: Engine | None, model: Model, here: Card) -> str:
    """Return why plans take no new weights, or ""."""
    if before is None:
        return "it has no built engine"
    if before.library != kind or not before.options.get("refit"):
        return f"its engine was not built by {LIBRARIES[kind].title} with --refit"
    if sorted(before.plans) != sorted(file for file, _ in model.parts):
        return "its ONNX files are others"
    return before.unfit(before.version, here)


def _each(
    model: Model, work: str, request: Callable[[str], Request], tell: Tell
) -> dict[str, Outcome]:
    found = {}
    for file, _ in model.parts:
        tell(f"{work} {file}")
        check_file(model.folder / file)
        found[file] = ask(request(file)).require(file)
    return found


def _sums(found: Mapping[str, Outcome]) -> dict[str, Any]:
    outcomes = found.values()
    return {
        "version": next(iter(outcomes)).version,
        "layers": sum(outcome.layers for outcome in outcomes),
        "plugins": sum(outcome.plugins for outcome in outcomes),
        "seconds": sum(sum(outcome.seconds.values()) for outcome in outcomes),
        "bytes": sum(outcome.bytes for outcome in outcomes),
    }


def _engine(
    kind: str,
    here: Card,
    found: Mapping[str, Outcome],
    sizes: Mapping[str, tuple[int, int, int]],
    options: Mapping[str, bool | int | str],
) -> Engine:
    sums = _sums(found)
    del sums["bytes"]
    plans = {file: Path(file).with_suffix(".plan").name for file in found}
    return Engine(kind, arch=here.arch, device=here.name, plans=plans, sizes=sizes,
                  options=options, note=_notes(found.values()), **sums)  # fmt: skip
