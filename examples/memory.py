"""What quantizing a language model takes of memory, by scheme, each in a process of its own.

python -m examples.memory [--schemes NAMES] [--width N] [--layers N] [--json]
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.table import Table

from effopt.console import Progress, print_error
from effopt.errors import EffoptError
from effopt.measure import peak_rss_mb
from effopt.passes.schemes import SCHEMES
from examples.variants import chosen, text_of

MEASURED = ("int8-dynamic", "int4-awq", "int4-gptq")
HEAD = 64
WIDTH, LAYERS = 2048, 10
"""Of a Llama with 1,946 MiB of weights in float32, of which 1 in 120 are embeddings and head."""


@dataclass(frozen=True)
class Peak:
    """Most memory over the weights, above that of a process that has converted a tiny model.

    The model that was given is 1 of it. `saved` is that of `effopt.optimize` and `save`.
    """

    scheme: str
    weights_mib: float
    optimized: float
    saved: float


def measured(scheme: str, width: int = WIDTH, layers: int = LAYERS) -> Peak:
    """Convert a model of random weights in a new process; raises what `effopt.optimize` does."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(_measured, scheme, width, layers).result()


def _measured(scheme: str, width: int, layers: int) -> Peak:
    import torch

    torch.set_num_threads(1)
    _convert(scheme, 128, 1)
    base = peak_rss_mb()
    weights, optimized = _convert(scheme, width, layers)
    saved = peak_rss_mb()
    return Peak(scheme, weights, (optimized - base) / weights, (saved - base) / weights)


def _convert(scheme: str, width: int, layers: int) -> tuple[float, float]:
    """Return MiB: of the weights, and the most that was held before the engine was written."""
    import torch
    import transformers

    import effopt

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        vocab_size=1024,
    )
    model: torch.nn.Module = transformers.LlamaForCausalLM(config)
    batches = [torch.randint(0, config.vocab_size, (2, 64)) for _ in range(4)]
    recipe = f"quantize{{scheme={scheme}}}"
    made = effopt.optimize(model.eval(), batches[0], recipe=recipe, calibration=batches)
    optimized = peak_rss_mb()
    with tempfile.TemporaryDirectory(prefix="effopt-memory-") as folder:
        made.save(Path(folder) / "engine", measure=False)
    return sum(weight.nbytes for weight in model.parameters()) / 2**20, optimized


def text(found: Sequence[Peak]) -> str:
    """Write the table and what its figures are."""
    made = Table("scheme", "effopt.optimize", "with save")
    for row in found:
        made.add_row(row.scheme, f"{row.optimized:.2f}", f"{row.saved:.2f}")
    title = f"Peak of memory over {found[0].weights_mib:,.0f} MiB of weights"
    what = (
        "Above that of a process that has converted a tiny model; one thread, four batches of "
        "2 x 64 tokens. The model that was given is 1 of it."
    )
    return text_of(title, made, "", what, "", colour=False)


def run(
    schemes: Sequence[str], width: int, layers: int, stage: Callable[[str], None]
) -> list[Peak]:
    """Measure schemes one after the other; `stage` hears which."""
    found = []
    for scheme in schemes:
        stage(scheme)
        found.append(measured(scheme, width, layers))
    return found


def _multiple(unit: int, text: str) -> int:
    if not text.isdecimal() or not int(text) or int(text) % unit:
        raise argparse.ArgumentTypeError(f"{text!r} is no multiple of {unit}")
    return int(text)


def main(words: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="examples.memory", description=__doc__)
    every, known = ",".join(MEASURED), ", ".join(SCHEMES)
    reader = chosen(SCHEMES, "scheme")
    parser.add_argument("--schemes", type=reader, default=every, help=f"of {known}")
    for name, default, unit in (("width", WIDTH, HEAD), ("layers", LAYERS, 1)):
        kind = partial(_multiple, unit)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"default: {default}")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args(words)
    try:
        with redirect_stdout(sys.stderr), Progress(quiet=False) as progress:
            found = run(given.schemes, given.width, given.layers, progress.stage)
    except EffoptError as error:
        print_error(error, error.exit_code, given.json, sys.stdout)
        return error.exit_code
    rows = [asdict(row) for row in found]
    print(json.dumps(rows, indent=1) if given.json else text(found).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
