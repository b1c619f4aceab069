"""The process that parses and builds: `python -m effopt.backends.trt_child REQUEST RESULT`.

Both are JSON files; `effopt.backends.trt_build` writes the one and reads the other. TensorRT's
parser and builder are native code that can crash, so they never run in the caller's process.

Networks are strongly typed: 10.x and TensorRT-RTX are told so, 11.x knows nothing else. TF32 is
off, since types are those of the ONNX file: float32 means float32. Run here with TensorRT-RTX 1.7
without a GPU: all of `_build`. Only read, from the 10.16 and 11.4 bindings: `_refit`.
"""

import ctypes
import importlib
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effopt.backends.trt_options import OPTIONS, has, keep_timing_cache, refusal

Record = dict[str, Any]

_PR_SET_PDEATHSIG = 1
_MOST = 20
"""Messages that a result holds at most."""


class Refused(Exception):
    """The library does not take the request: the result says where, why and what else to do."""

    def __init__(self, reason: str, remedy: str = "", node: str = "", kind: str = "model") -> None:
        super().__init__(reason)
        self.record = {"node": node, "reason": reason, "remedy": remedy, "kind": kind}


class Messages:
    """What the library says while it works, by severity."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def logger(self, trt: Any) -> Any:
        """Return a logger of the library that fills the lists."""

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(logger, severity: Any, text: str) -> None:
                self._add(severity.name, text.strip())

        return Logger()

    def _add(self, severity: str, text: str) -> None:
        lines = self.warnings if severity == "WARNING" else self.errors
        if severity in ("WARNING", "ERROR", "INTERNAL_ERROR") and text not in lines:
            lines.append(text)


def serve(request: Record) -> Record:
    """Do what a request asks for; a refusal is a result as well."""
    said = Messages()
    try:
        trt = _library(request["module"])
        logger = said.logger(trt)
        done = {"build": _build, "refit": _refit}[request["do"]](trt, logger, request, said)
    except Refused as refused:
        done = {"refused": refused.record}
    return {**done, "warnings": said.warnings[:_MOST]}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library of it is not there
        first = (str(error).splitlines() or ["no reason given"])[0]
        raise Refused(f"{name} cannot be imported: {first}", kind="library") from error


# --- building ---------------------------------------------------------------------------------


def _build(trt: Any, logger: Any, request: Record, said: Messages) -> Record:
    """Parse the file, and build the plan unless the request has no place for it."""
    for name in request["options"]:
        if reason := refusal(trt, name):
            raise Refused(reason, "leave the option out", kind="option")
    start = time.perf_counter()
    note = _register(trt, request)
    builder = trt.Builder(logger)
    network = builder.create_network(_typed(trt))
    _parse(trt, logger, network, request["onnx"])
    layers = [network.get_layer(place) for place in range(network.num_layers)]
    plugins = sum(layer.type.name.startswith("PLUGIN") for layer in layers)
    if request["plugins"] and not note and plugins != (wanted := sum(request["plugins"].values())):
        # A function would stand in for them without a word, slower than what was asked for.
        reason = f"the parser made plugins of {plugins} of {wanted} nodes that are plugins"
        raise Refused(reason, "convert the model for a target with plugins=off")
    done = {
        "version": trt.__version__,
        "layers": len(layers),
        "plugins": plugins,
        "note": note,
        "seconds": {"parse": time.perf_counter() - start},
        "bytes": 0,
    }
    if not request["plan"]:
        return done
    start = time.perf_counter()
    config = _config(trt, builder, network, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        names = [layer.name for layer in layers]
        raise Refused(*_blame(said.errors, names))
    Path(request["plan"]).write_bytes(plan)
    if "timing_cache" in request["options"]:
        keep_timing_cache(config, Path(request["options"]["timing_cache"]))
    done["seconds"]["build"] = time.perf_counter() - start
    return {**done, "bytes": Path(request["plan"]).stat().st_size}


def _register(trt: Any, request: Record) -> str:
    """Register the plugins of the file ahead of its parser; return why that cannot be, or ""."""
    if not request["plugins"]:
        return ""
    from effopt.backends import trt_plugins

    taken = trt_plugins.supports(trt)
    if not taken.ok:
        return taken.reason
    if lacking := sorted(trt_plugins.stems(request["plugins"]) - set(request["ptx"])):
        return f"the folder has no PTX of {', '.join(lacking)}"
    texts = {stem: Path(path).read_text() for stem, path in request["ptx"].items()}
    trt_plugins.register(trt, request["plugins"], texts.__getitem__)
    return ""


def _typed(trt: Any) -> int:
    """Return the flags of a strongly typed network; 11.x may have dropped the flag."""
    flag = "NetworkDefinitionCreationFlag.STRONGLY_TYPED"
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if has(trt, flag) else 0


def _parse(trt: Any, logger: Any, network: Any, path: str) -> None:
    """Fill the network from a file; external weights lie beside it."""
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path) or parser.num_errors:
        raise _parser_refusal(parser, "parse")


def _parser_refusal(parser: Any, work: str) -> Refused:
    """Name the node of the first error, and count the others."""
    errors = [parser.get_error(place) for place in range(parser.num_errors)]
    if not errors:
        return Refused(f"the parser does not {work} the file, and says no more")
    first = errors[0]
    name, operator = first.node_name(), first.node_operator()
    node = f"{name} ({operator})" if name and operator else name or operator
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    text = " ".join(first.desc().split())
    return Refused(f"{text} [{first.code().name}]{more}", "", node)


def _config(trt: Any, builder: Any, network: Any, request: Record) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    for name, value in request["options"].items():
        OPTIONS[name].apply(trt, config, value)
    _aim(trt, config, request["archs"])
    profile = builder.create_optimization_profile()
    for name, sizes in request["profiles"].items():
        profile.set_shape(name, *(tuple(size) for size in sizes))
    if request["profiles"] and config.add_optimization_profile(profile) < 0:
        raise Refused(f"the sizes {request['profiles']} are no profile of this network")
    return config


def _aim(trt: Any, config: Any, archs: list[str]) -> None:
    """Name the architectures of the plan; none are named where it is for the GPU that is here."""
    if not archs:
        return
    if not has(trt, "IBuilderConfig.set_compute_capability"):
        reason = f"{trt.__name__} {trt.__version__} builds for the GPU that is here alone"
        raise Refused(reason, "build on that machine", kind="arch")
    names = [f"SM{arch.removeprefix('sm_')}" for arch in archs]
    for name, arch in zip(names, archs, strict=True):
        if not has(trt, f"ComputeCapability.{name}"):
            offered = " ".join(f"sm_{number}" for number in sorted(_offered(trt)))
            reason = f"{trt.__name__} {trt.__version__} does not build for {arch}"
            raise Refused(reason, f"it builds for {offered}", kind="arch")
    config.num_compute_capabilities = len(names)
    for place, name in enumerate(names):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), place)


def _offered(trt: Any) -> Iterator[int]:
    for name in trt.ComputeCapability.__members__:
        if name.removeprefix("SM").isdigit():
            yield int(name.removeprefix("SM"))


def _blame(errors: list[str], layers: list[str]) -> tuple[str, str, str]:
    """Return what the builder said last, what to do, and the longest name of a layer in it."""
    text = errors[-1] if errors else "the builder made no plan, and says no more"
    words = set(re.findall(r"[\w/.-]+", text))  # "r" is in many words, and names one layer
    named = [name for name in layers if name in words]
    remedy = "build on the machine that has the GPU" if "CUDA_SUCCESS" in text else ""
    return " ".join(text.split()), remedy, max(named, key=len, default="")


# --- new weights in a plan --------------------------------------------------------------------


def _refit(trt: Any, logger: Any, request: Record, said: Messages) -> Record:
    """Put the weights of a newer ONNX file of the same graph into a plan built to be refitted."""
    start = time.perf_counter()
    if lacking := _register(trt, request):
        reason = f"the plan holds plugins, and {lacking}"
        raise Refused(reason, "build the engine again", kind="plan")
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(Path(request["old"]).read_bytes())
    if engine is None:
        reason = said.errors[-1] if said.errors else "the plan does not load here"
        raise Refused(" ".join(reason.split()), "build the engine again", kind="plan")
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(request["onnx"]):
        raise _parser_refusal(parser, "take the weights of")
    if not refitter.refit_cuda_engine():
        missing = ", ".join(refitter.get_missing_weights()[:_MOST])
        reason = f"the file lacks weights of the plan: {missing}"
        raise Refused(reason, "build the engine again", kind="plan")
    plan = bytes(engine.serialize())
    Path(request["plan"]).write_bytes(plan)
    seconds = {"refit": time.perf_counter() - start}
    known = {"version": trt.__version__, "layers": engine.num_layers, "plugins": 0, "note": ""}
    return {**known, "seconds": seconds, "bytes": len(plan)}


if __name__ == "__main__":
    if sys.platform == "linux":  # end with the parent, however that ends
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    asked, answer = map(Path, sys.argv[1:3])
    answer.write_text(json.dumps(serve(json.loads(asked.read_text()))))
