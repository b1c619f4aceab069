"""`effopt passes`, `recipes` and `targets`: what there is to choose from."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

from effopt.console import Answer, Progress
from effopt.plain import figure

Run = Callable[[argparse.Namespace, Progress], Answer]


def passes(arguments: argparse.Namespace, progress: Progress) -> Answer:
    """List the passes with their options."""
    from effopt.passes import names
    from effopt.pipeline import pass_class

    records = [_pass(name, pass_class(name)) for name in names()]
    rows = [row for record in records for row in _pass_rows(record)]
    head = ("pass, options", "kind, default", "what it does")
    return Answer({"passes": records}, _text("Passes", head, rows))


def _pass(name: str, kind: type[Any]) -> dict[str, Any]:
    summary = str(kind.__doc__ or "").strip().split("\n")[0]
    options = [_option(item) for item in fields(kind)]
    return {"name": name, "exact": bool(kind.exact), "summary": summary, "options": options}


def _option(item: Any) -> dict[str, Any]:
    made = item.default_factory is not MISSING
    required = item.default is MISSING and not made
    default = item.default_factory() if made else item.default
    return {
        "name": item.name,
        "type": item.type.__name__ if isinstance(item.type, type) else str(item.type),
        "required": required,
        "default": None if required else default,
        "help": str(item.metadata.get("help", "")),
    }


def _pass_rows(record: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    from effopt.spec import show

    yield record["name"], "exact" if record["exact"] else "lossy", record["summary"]
    for option in record["options"]:
        default = "required" if option["required"] else show(option["default"])
        yield f"  {option['name']}", default, option["help"]


def recipes(arguments: argparse.Namespace, progress: Progress) -> Answer:
    """List the recipes with their specs and sources."""
    import effopt

    records = [asdict(recipe) for recipe in effopt.recipes().values()]
    rows = [(r["name"], f"{r['summary']}\n  {r['spec']}\n  source: {r['source']}") for r in records]
    return Answer({"recipes": records}, _text("Recipes", ("name", "what it is"), rows))


def targets(arguments: argparse.Namespace, progress: Progress) -> Answer:
    """List the targets with what they can compute in."""
    from effopt.target import TARGETS

    records = [
        {**asdict(row), "peak": dict(row.peak), "tensorrt": row.tensorrt}
        for row in TARGETS.values()
    ]
    rows = [
        (
            row.name,
            row.arch,
            row.tensorrt or "-",
            ", ".join(row.dtypes),
            ", ".join(row.schemes) or "-",
            figure(row.bandwidth),
        )
        for row in TARGETS.values()
    ]
    head = ("name", "arch", "TensorRT", "types", "quantization", "GB/s")
    return Answer({"targets": records}, _text("Targets", head, rows))


def _text(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from effopt.report_text import plain_table

    return plain_table(title, columns, rows)
