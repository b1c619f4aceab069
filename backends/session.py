"""Running an ONNX file in onnxruntime; free of torch."""

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from effopt.backend import YES, Array, Support
from effopt.backends.onnx_check import FLOAT8, check_file
from effopt.backends.ort_providers import CPU, SETTINGS, WANTED, Bound, choose, refusals
from effopt.errors import MissingError, UsageError, VerificationError
from effopt.signature import Signature

_REMEDY = "pip install 'effopt[ort]'"


def runtime() -> Support:
    """Tell whether onnxruntime is installed."""
    if importlib.util.find_spec("onnxruntime") is not None:
        return YES
    return Support(False, f"onnxruntime is not installed: {_REMEDY}")


class Session:
    """A model file in onnxruntime: flat arrays in and out, in the signature's order.

    `providers` are the execution providers that it has, the first does the work; `reasons` say
    why it has not those that its target wants before them, and `note` says it in one line.
    """

    def __init__(
        self,
        path: Path,
        signature: Signature,
        *,
        check_only: bool = False,
        alone: bool = True,
        kind: str = "cpu",
    ) -> None:
        """Check the file, then open it; `check_only` skips what makes it fast and takes memory.

        Where it is not `alone`, and others of the process take turns with it, its threads do not
        spin for work: those of segments took two to three times as long, beside each other.
        `kind` is that of a target: on "gpu" it runs there if it can, unless it is to `check_only`.
        Raises UnsafeFileError for a file that is no plain model, MissingError where onnxruntime
        is not installed, VerificationError where it cannot load the file.
        """
        pairs = bool(check_file(path) & FLOAT8)
        opened = partial(_open, path, check_only, pairs=pairs, alone=alone)
        chosen = choose(WANTED["cpu" if check_only else kind], _imported(), opened)
        self.providers, self.reasons = chosen.providers, chosen.reasons
        self._session = chosen.session
        self._inputs = [spec.port for spec in signature.inputs]
        self._outputs = [spec.port for spec in signature.outputs]
        found = [port.name for port in self._session.get_inputs()]
        # A default that a caller may overwrite is an initializer and an input in one.
        found += [port.name for port in self._session.get_overridable_initializers()]
        if found != self._inputs:
            reason = f"{path.name} takes {found}, its signature says {self._inputs}"
            raise VerificationError(reason, "build the engine again")
        given = [port.name for port in self._session.get_outputs()]
        if given != self._outputs:
            reason = f"{path.name} gives {given}, its signature says {self._outputs}"
            raise VerificationError(reason, "build the engine again")
        self._bound = Bound(chosen, self._outputs, _imported()) if chosen.on_gpu else None

    @property
    def place(self) -> str:
        """What does the work: "CPU", or the GPU with its provider."""
        first = self.providers[0].removesuffix("ExecutionProvider")
        return first if self._bound is None else f"GPU ({first})"

    @property
    def note(self) -> str:
        """Why it does not run where its target wants it; "" where it does."""
        return "; ".join(self.reasons)

    def run(self, inputs: list[Array]) -> list[Array]:
        """Run once; UsageError for inputs that the model cannot take, such as an unknown token.

        MissingError where the GPU has not enough memory.
        """
        feeds = dict(zip(self._inputs, inputs, strict=True))
        if self._bound:
            return self._bound.run(feeds)
        try:
            outputs: list[Array] = self._session.run(self._outputs, feeds)
        except refusals() as error:
            first = str(error).strip().splitlines()[0]
            remedy = "check that the values and sizes are some that the model takes"
            raise UsageError(f"onnxruntime cannot run on these inputs: {first}", remedy) from error
        return outputs


def optimize(path: Path, into: Path) -> None:
    """Write the graph that onnxruntime makes of a file on this machine; for inspection alone.

    Weights go beside it, so that their size has no limit. Errors are as with Session.
    """
    _open(path, check_only=False, optimized=into)


def _open(
    path: Path,
    check_only: bool,
    optimized: Path | None = None,
    *,
    pairs: bool = False,
    alone: bool = True,
    providers: Sequence[str] = (CPU,),
) -> Any:
    """Open a file; `pairs` leaves quantize-dequantize pairs where they are.

    onnxruntime moves codes into integer products and transposes, which take no 8-bit floats, and
    then refuses the graph that it made.
    """
    onnxruntime = _imported()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings are about its own choices
    if check_only:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if check_only or optimized is not None:  # it is not run: no second copy of the weights
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not alone:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if pairs:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        weights = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(weights, f"{optimized.name}.data")
    # Left alone, it prints that a provider failed, and goes on with another.
    more: dict[str, Any] = {}
    if len(providers) > 1:
        settings = [dict(SETTINGS.get(name, {})) for name in providers]
        more = {"enable_fallback": 0, "provider_options": settings}
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[*providers], **more)
    except refusals() as error:
        reason = f"onnxruntime cannot load {path.name}: {str(error).strip().splitlines()[0]}"
        raise VerificationError(reason, "report this model: the export is at fault") from error


def _imported() -> Any:
    """Return onnxruntime; MissingError where it is not installed."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingError("onnxruntime is not installed", _REMEDY) from error
    return onnxruntime
