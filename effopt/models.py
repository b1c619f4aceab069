"""Models by their spelling on the command line, opened without running a stranger's code.

Three forms: a Hugging Face folder, a `.pt2` archive, and `package.module:factory`. Only the last
two run code, and both only because the user said so: by `trust`, or by naming the code.
"""

import difflib
import importlib
import json
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # the name of torch's refusal; nothing is unpickled here
from typing import Any

from effopt.errors import CaptureError, EffoptError, MissingError, UnsafeFileError, UsageError

FORMS = (
    "MODEL is a Hugging Face folder (config.json and safetensors), a .pt2 archive, "
    "or package.module:factory"
)

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_CONFIG_BYTES = 4 * 2**20
_SAFE = re.compile(r"[A-Za-z0-9._-]{1,128}")


def load_model(spec: str, *, trust: bool = False) -> tuple[Any, Any]:
    """Open a model and, where it brings some, its example inputs (else None).

    Raises UsageError for what is none of the three forms, UnsafeFileError for a file that could
    run code, MissingError for a package that is not installed, CaptureError for a factory that
    fails.
    """
    path = Path(spec)
    if path.is_dir():
        return _from_folder(path), None
    if path.suffix == ".pt2" and path.is_file():
        return _from_archive(path, trust), None
    if _FACTORY.fullmatch(spec) and not path.exists():
        return _from_factory(*spec.split(":"))
    if path.exists():
        raise UsageError(f"{spec} is no model that effopt reads", FORMS)
    raise UsageError(f"there is no {spec}", FORMS)


@contextmanager
def _opening(failure: str) -> Iterator[None]:
    """Turn what a library raises over a foreign file into an error of ours."""
    try:
        yield
    except UnpicklingError as error:
        raise UnsafeFileError(
            f"{failure}: it holds more than tensors", "convert the weights to safetensors"
        ) from error
    except Exception as error:  # over damaged data the libraries raise anything
        raise UsageError(f"{failure}: {type(error).__name__}: {error}", FORMS) from error


# --- a Hugging Face folder


def _from_folder(folder: Path) -> Any:
    """Build the class that the config names, with its weights, and none of the folder's code."""
    config = _config(folder)
    weights = _weights(folder)
    transformers = _transformers()
    kind = _architecture(transformers, config)
    import torch

    transformers.utils.logging.disable_progress_bar()
    with _opening(f"{kind.__name__} cannot be loaded from {folder}"):
        model, loaded = kind.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=weights == "safetensors",
            weights_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise UsageError(
            f"the weights of {folder} lack {len(missing)} tensors of {kind.__name__} "
            f"(first: {missing[0]}): they would be random",
            "save the model that the config names, with its head",
        )
    return model.eval()


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no config.json", FORMS)
    if path.stat().st_size > _CONFIG_BYTES:
        raise UnsafeFileError(f"{path} is larger than {_CONFIG_BYTES} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}", FORMS) from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} holds no JSON object", FORMS)
    if "auto_map" in config:
        raise UnsafeFileError(
            f"{path} names Python code of its own (auto_map), which effopt does not run",
            "write package.module:factory that builds the model, and pass that",
        )
    return config


def _weights(folder: Path) -> str:
    """Tell what holds the weights; the index of a split file must name files of the folder."""
    for index in folder.glob("*.index.json"):
        _check_index(index)
    if any(folder.glob("*.safetensors")):
        return "safetensors"
    if any(folder.glob("*.bin")):
        return "bin"
    raise UsageError(f"{folder} has no weights (*.safetensors)", "save them with save_pretrained")


def _check_index(path: Path) -> None:
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UnsafeFileError(f"{path} is damaged: {error!r}") from error
    odd = [name for name in names if not _SAFE.fullmatch(str(name))]
    if odd:
        raise UnsafeFileError(f"{path} names a file outside its folder: {odd[0]!r}")


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingError(
            "a Hugging Face folder needs the package transformers", "pip install effopt[hf]"
        ) from error


def _architecture(transformers: Any, config: dict[str, Any]) -> Any:
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise UsageError("the config names no architecture", 'add "architectures" to config.json')
    name = str(names[0])
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise UsageError(
            f"transformers {transformers.__version__} has no model {name!r}",
            "upgrade transformers, or pass package.module:factory that builds the model",
        )
    return kind


# --- an exported program


def _from_archive(path: Path, trust: bool) -> Any:
    """Load a `.pt2` archive: it can run code, so nothing of it is read without trust."""
    if not trust:
        raise UnsafeFileError(
            f"{path} could run code when it is loaded (a .pt2 archive may hold pickles)",
            "pass --trust (trust=True) if you know where it comes from",
        )
    import torch

    with _opening(f"{path} is no exported program"):
        return torch.export.load(path)


# --- a factory


def _from_factory(module: str, name: str) -> tuple[Any, Any]:
    """Call the factory; the current folder is importable, as under `python -m`."""
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    factory = _factory(module, name)
    with _reporting(f"{module}:{name}", module):
        made = factory()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    import torch

    if not isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
        raise UsageError(
            f"{module}:{name} returned a {type(made).__name__}",
            "return an nn.Module, or (module, example_inputs)",
        )
    return model, inputs


def _factory(module: str, name: str) -> Callable[[], Any]:
    with _reporting(module, module):
        found = importlib.import_module(module)
    made = getattr(found, name, None)
    if callable(made):
        return made  # type: ignore[no-any-return]
    known = [key for key, item in vars(found).items() if callable(item) and key[0] != "_"]
    what = f"{module} has no {name!r}" if made is None else f"{module}:{name} cannot be called"
    raise UsageError(what, _nearest(name, known))


def _no_module(module: str, error: ModuleNotFoundError) -> EffoptError:
    """Tell a wrong name from a package that the user's module needs and that is not installed."""
    missing = str(error.name)
    if not f"{module}.".startswith(f"{missing}."):
        return MissingError(f"{module} needs the package {missing}", f"pip install {missing}")
    parent, _, leaf = missing.rpartition(".")
    above = importlib.import_module(parent) if parent else None
    paths = getattr(above, "__path__", []) if parent else [str(Path.cwd())]
    known = [item.name for item in pkgutil.iter_modules(paths)]
    return UsageError(f"there is no module {missing!r}", _nearest(leaf, known))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else FORMS


@contextmanager
def _reporting(name: str, module: str) -> Iterator[None]:
    """Turn what the user's own code raises into an error that names its line."""
    try:
        yield
    except EffoptError:
        raise
    except ModuleNotFoundError as error:
        raise _no_module(module, error) from error
    except (Exception, SystemExit) as error:  # the user's code can raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise CaptureError(
            f"{name} raised {type(error).__name__}: {error} at {frame.filename}:{frame.lineno}",
            "run the factory once in Python on its own",
        ) from error
