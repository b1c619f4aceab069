"""The benchmark: three models by six ways, a conversion, analysis time, and integer engines.

python -m examples.bench [--models digits,vit-s,bert,vit-b,depth,integers] [--seconds S] [--json]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from rich import box
from rich.table import Table
from torch import nn

from effopt.console import Progress, print_error
from effopt.errors import EffoptError
from effopt.measure import Cosine, cosine
from effopt.plain import figure
from effopt.report import Latency
from examples import depth, footprint, integers
from examples.digits.data import canvases
from examples.digits.model import trained
from examples.integer_models import CASES as INTEGER_CASES
from examples.variants import (
    Tensors,
    Variant,
    caption,
    cells,
    chosen,
    converted,
    eager,
    plain_export,
    record,
    table,
    text_of,
    threads,
    timed,
)

BATCHES = (1, 8)
_ROWS = 16  # inputs on which outputs are compared; the first eight are timed
INT8 = "quantize{scheme=int8-dynamic}"
FOOTPRINT = "vit-b"
DEPTH = "depth"
INTEGERS = "integers"
MORE = (FOOTPRINT, DEPTH, INTEGERS)


@dataclass(frozen=True)
class Case:
    """One model of the benchmark, and the r of `tome` that suits its number of tokens."""

    title: str
    make: Callable[[], tuple[nn.Module, Tensors]]
    tome: int


def _digits() -> tuple[nn.Module, Tensors]:
    return trained()[0], {"pixels": torch.from_numpy(canvases("validation", _ROWS, seed=0)[0])}


def _vit_s() -> tuple[nn.Module, Tensors]:
    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536
    )
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model.eval(), {"pixel_values": torch.randn(_ROWS, 3, 224, 224)}


def _bert() -> tuple[nn.Module, Tensors]:
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    ids = torch.randint(1000, config.vocab_size, (_ROWS, 128))
    lengths = torch.randint(96, 129, (_ROWS, 1))
    mask = (torch.arange(128) < lengths).to(torch.int64)
    return model.eval(), {"input_ids": ids * mask, "attention_mask": mask}


CASES: Mapping[str, Case] = MappingProxyType(
    {
        "digits": Case("digits: trained, 6 blocks of 128, 145 tokens", _digits, 16),
        "vit-s": Case("ViT-S/16: random weights, 12 blocks of 384, 197 tokens", _vit_s, 13),
        "bert": Case("BERT: random weights, 6 blocks of 384, 128 tokens", _bert, 12),
    }
)


@dataclass(frozen=True)
class Line:
    """One variant with its times, and its output against the original's, row by row."""

    variant: Variant
    latency: tuple[Latency, ...]
    cosine: Cosine


@dataclass(frozen=True)
class Result:
    """All lines of one model."""

    title: str
    lines: tuple[Line, ...]

    def document(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        rows = [
            {**record(line.variant, line.latency), "cosine": asdict(line.cosine)}
            for line in self.lines
        ]
        return {"title": self.title, "rows": rows}

    def text(self, colour: bool) -> str:
        """Return the table."""
        rows = [
            [
                *cells(line.variant, line.latency),
                (f"{line.cosine.mean:.5f}", f"{line.cosine.min:.5f}"),
            ]
            for line in self.lines
        ]
        latency = [one for line in self.lines for one in line.latency]
        below = caption(latency, f"the least cosine of {_ROWS} outputs to the original's")
        made = table(self.title, BATCHES, ("cosine\nleast",), rows)
        return text_of(made, "", below, "", colour=colour)


def bench(case: Case, seconds: float, stage: Callable[[str], None] = lambda name: None) -> Result:
    """Make the variants of one model and time them interleaved.

    `seconds` is the time for each batch size, `stage` hears what begins.
    """
    torch.manual_seed(0)
    model, inputs = case.make()
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    with tempfile.TemporaryDirectory(prefix="effopt-bench-") as scratch:
        variants = _variants(case, model, inputs, Path(scratch), stage)
        want = eager(model, 0, 0).run(feeds)
        found = [cosine(want, variant.run(feeds)) for variant in variants]
        latency = []
        for batch in BATCHES:
            stage(f"time batch {batch}")
            latency.append(timed(variants, feeds, batch, seconds))
    return Result(
        case.title,
        tuple(
            Line(variant, tuple(times[variant.name] for times in latency), own)
            for variant, own in zip(variants, found, strict=True)
        ),
    )


def _variants(
    case: Case, model: nn.Module, inputs: Tensors, scratch: Path, stage: Callable[[str], None]
) -> list[Variant]:
    made, macs = list[Variant](), 0
    tome = f"tome{{r={case.tome}}}"
    names = {"folded export": "exact", "balanced": "balanced", f"tome r={case.tome}": tome}
    names |= {"int8": INT8, "balanced + int8": f"balanced,{INT8}"}
    for name, recipe in names.items():
        stage(f"convert with recipe {recipe}")
        plain = recipe == "exact"
        variant, report = converted(name, model, inputs, scratch / recipe, recipe, plain=plain)
        made, macs = [*made, variant], report.macs_before
    stage("export plainly")
    (scratch / "plain").mkdir()
    return [plain_export(model, inputs, scratch / "plain", macs), *made]


def conversion_text(found: Mapping[str, Any], colour: bool) -> str:
    """Write the table of a conversion: seconds by stage, then memory."""
    title = f"Converting {found['model']}, {found['threads']} threads"
    made = Table("stage")
    made.box, made.show_edge, made.pad_edge = box.SIMPLE_HEAD, False, False
    made.add_column("seconds", justify="right")
    for stage in found["stages"]:
        made.add_row(stage["name"], f"{stage['seconds']:.2f}")
    made.add_section()
    made.add_row("in all", f"{found['seconds']:.2f}")
    words = ("import torch, transformers", "with the model built", "peak", "weights")
    keys = ("import_mib", "model_mib", "peak_mib", "weights_mib")
    parts = [f"{word} {figure(found[key])} MiB" for word, key in zip(words, keys, strict=True)]
    below = f"Memory: {', '.join(parts)}; (peak - import) / weights = {found['ratio']:.2f}."
    return text_of(title, made, "", below, "", colour=colour)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="examples.bench", description=__doc__)
    every = ",".join((*CASES, *MORE))
    parser.add_argument("--models", type=chosen((*CASES, *MORE)), default=every, help=f"of {every}")
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="timing of each batch size"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args(words)
    try:
        with redirect_stdout(sys.stderr), Progress(quiet=False) as progress:
            document, texts = _run(given.models, given.seconds, progress.stage)
    except EffoptError as error:
        print_error(error, error.exit_code, given.json, sys.stdout)
        return error.exit_code
    print(json.dumps(document, indent=1) if given.json else "\n".join(texts).rstrip())
    return 0


def _run(
    names: Sequence[str], seconds: float, stage: Callable[[str], None]
) -> tuple[dict[str, Any], list[str]]:
    """Run the named models; return the JSON document and the tables."""
    document: dict[str, Any] = {"threads": threads(), "models": {}}
    texts = []
    for name in names:
        stage(name)
        if name == FOOTPRINT:
            document["conversion"] = footprint.measured()
            texts.append(conversion_text(document["conversion"], colour=False))
            continue
        if name == DEPTH:
            curve = depth.measured(depth.LAYERS, 3, stage)
            document["depth"] = depth.document(curve)
            texts.append(depth.text(curve))
            continue
        if name == INTEGERS:
            engines = integers.measured(tuple(INTEGER_CASES), (threads(),), seconds, stage)
            document["integers"] = integers.document(engines)
            texts.append(integers.text(engines))
            continue
        found = bench(CASES[name], seconds, stage)
        document["models"][name] = found.document()
        texts.append(found.text(colour=False))
    return document, texts


if __name__ == "__main__":
    sys.exit(main())
