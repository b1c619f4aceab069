"""Quantization schemes on the trained models: how far outputs move, and how small files get.

python -m examples.schemes [--models digits,text] [--json]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor, nn

import effopt
from effopt.console import Progress, print_error
from effopt.errors import EffoptError
from effopt.measure import cosine
from effopt.plain import figure
from examples.digits.data import canvases, evaluation_set
from examples.digits.model import trained
from examples.text.data import encode, sentences
from examples.text.model import load
from examples.text.quality import compare
from examples.variants import Floats, chosen, text_of

BATCH = 50
CALIBRATION = 128
"""Samples that calibrate: canvases of the validation set, sentences that are held out for it."""

FLOAT = "float"
SCHEMES: Mapping[str, str] = MappingProxyType({
    FLOAT: "exact",
    "fp16": "quantize{scheme=fp16}",
    "int8-weight": "quantize{scheme=int8-weight}",
    "int8-dynamic by row": "quantize{scheme=int8-dynamic,activations=row}",
    "int8-dynamic": "quantize{scheme=int8-dynamic}",
    "balanced + int8-dynamic": "balanced,quantize{scheme=int8-dynamic}",
    "int8-dynamic, no scales": "quantize{scheme=int8-dynamic,alpha=0}",
    "int8-static": "quantize{scheme=int8-static}",
    "int8-static, no scales": "quantize{scheme=int8-static,alpha=0}",
    "int4-gptq": "quantize{scheme=int4-gptq}",
    "int4-awq": "quantize{scheme=int4-awq}",
    "int4-awq, no clipping": "quantize{scheme=int4-awq,clip=false}",
    "int4-rtn": "quantize{scheme=int4-rtn}",
})  # fmt: skip
"""The recipe of each row."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """A trained model: its inputs, those that calibrate, and figures from two sets of outputs."""

    model: nn.Module
    inputs: Arrays
    calibration: Arrays
    figures: Callable[[Floats, Floats], dict[str, float]]


def _digits() -> Case:
    pixels, labels = evaluation_set()
    known = canvases("validation", CALIBRATION, seed=0)[0]

    def figures(want: Floats, got: Floats) -> dict[str, float]:
        right = float((got.argmax(1) == labels).mean())
        return {"accuracy": right, **_cosines(want, got)}

    return Case(trained()[0], {"pixels": pixels}, {"pixels": known}, figures)


def _text() -> Case:
    return Case(load(), encode(sentences("evaluation")), encode(sentences("calibration")), compare)


def _cosines(want: Floats, got: Floats) -> dict[str, float]:
    found = cosine(want, got)
    return {"cos_mean": found.mean, "cos_min": found.min}


CASES: Mapping[str, Callable[[], Case]] = MappingProxyType({"digits": _digits, "text": _text})


def measured(case: Case, stage: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Convert by each recipe and run all inputs; figures are against the original in torch.

    `bytes` are of the file of the engine. Raises what `effopt.optimize` does.
    """
    with torch.no_grad():
        want = np.concatenate([_flat(case.model(**part)) for part in _parts(case.inputs)])
    data, found = list(_parts(case.calibration)), dict[str, dict[str, float]]()
    for name, recipe in SCHEMES.items():
        stage(f"convert with recipe {recipe}")
        with tempfile.TemporaryDirectory(prefix="effopt-schemes-") as scratch:
            sample = {key: array[:8] for key, array in data[0].items()}
            made = effopt.optimize(case.model, sample, recipe=recipe, calibration=data)
            folder = made.save(Path(scratch) / "made", measure=False)
            engine = effopt.load(folder)
            stage(f"run {name}")
            got = np.concatenate([_flat(engine(**part)) for part in _parts(case.inputs)])
            size = sum(part.stat().st_size for part in folder.glob("model.onnx*"))
        found[name] = {**case.figures(want, got), "bytes": size}
    return found


def _parts(inputs: Arrays) -> Iterator[dict[str, Tensor]]:
    """Cut inputs into batches."""
    count = len(next(iter(inputs.values())))
    for start in range(0, count, BATCH):
        yield {k: torch.from_numpy(array[start : start + BATCH]) for k, array in inputs.items()}


def _flat(found: Any) -> Floats:
    """Return the only output, however it is nested."""
    while isinstance(found, (dict, tuple)):
        (found,) = found.values() if isinstance(found, dict) else found
    return np.asarray(found)


# --- printing -----------------------------------------------------------------------------------


def text(name: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Write the rows of one model as a table; cosines as their distance to 1."""
    figures = [key for key in rows[FLOAT] if key != "bytes"]
    made = Table(title=f"{name}: against the original in float32", title_justify="left")
    heads = (key.replace("cos_", "1-cos ").replace("rho", "1-rho") for key in figures)
    for head in ("scheme", *heads, "file"):
        made.add_column(head, justify="left" if head == "scheme" else "right")
    for scheme, row in rows.items():
        share = f"{row['bytes'] / rows[FLOAT]['bytes']:.3f}"
        made.add_row(scheme, *(_cell(key, row[key]) for key in figures), share)
    return text_of(made, "", colour=False)


def _cell(name: str, value: float) -> str:
    if name.startswith("cos") or name == "rho":
        return f"{max(0.0, 1 - value):.1e}"
    return f"{figure(100 * value, 4)} %"


def main(words: Sequence[str] | None = None) -> int:
    """Print a table for each model, or one JSON document."""
    parser = argparse.ArgumentParser(prog="examples.schemes", description=__doc__)
    every = ",".join(CASES)
    parser.add_argument("--models", type=chosen(CASES), default=every, help=f"of {every}")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args(words)
    try:
        with redirect_stdout(sys.stderr), Progress(quiet=False) as progress:
            found = {name: measured(CASES[name](), progress.stage) for name in given.models}
    except EffoptError as error:
        print_error(error, error.exit_code, given.json, sys.stdout)
        return error.exit_code
    shown = "\n".join(text(name, rows) for name, rows in found.items())
    print(json.dumps(found, indent=1) if given.json else shown.rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
