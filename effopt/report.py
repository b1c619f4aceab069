"""Report: what an optimization did, what it gained and what it cost, as plain data.

JSON first: the text and the page are rendered from the same record, so they never disagree.
Free of torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from effopt.errors import UnsafeFileError
from effopt.plain import json_ready

if TYPE_CHECKING:
    from effopt.measure import Timing


@dataclass(frozen=True)
class Stage:
    """One stage of the run (`capture`, `merge-tokens`, `build`) and its seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class StepRecord:
    """One pass of the recipe: what it changed, or why it changed nothing.

    `skipped` is the reason of a step that was left out, else "". `facts` is JSON; the pictures
    read `{"tokens": N, "sites": [{"path": block, "before": tokens, "after": tokens}, ...]}`, and
    `effopt.report_layers` says what they hold of quantized layers.
    """

    spec: str
    changed: bool
    skipped: str = ""
    notes: tuple[str, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Quality:
    """One figure of quality with its bounds, on how many samples of what data it was measured.

    `low` and `high` are the ends of a 95 % interval, or the least and the greatest of the samples
    where the metric says so; None where there is none.
    """

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    data: str = ""


@dataclass(frozen=True)
class Latency:
    """The time of one call of one variant at one batch size.

    Milliseconds; `low_ms` and `high_ms` hold the middle half of the calls. `speedup` is over the
    variant named `baseline`, with its 95 % interval; the baseline itself has none. `mean_ms` and
    `p95_ms` are there where calls differ by input, as with early exits; the speed-up is of means.
    `min_ms` is the least time, `speedup_min` the ratio of least times.
    """

    variant: str
    batch: int
    median_ms: float
    p90_ms: float
    p99_ms: float
    low_ms: float
    high_ms: float
    repeats: int
    threads: int
    warmup: int = 0
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    baseline: str = ""
    mean_ms: float | None = None
    p95_ms: float | None = None
    min_ms: float | None = None
    speedup_min: float | None = None

    @staticmethod
    def of(variant: str, batch: int, threads: int, timing: "Timing") -> "Latency":
        """Take over what `measure.compare` found."""
        return Latency(variant=variant, batch=batch, threads=threads, **timing.figures())


@dataclass(frozen=True)
class Estimate:
    """The least milliseconds of a call on the target by its peaks and bandwidth; not measured.

    `batch` is 0 where the model has one batch size of its own. See `effopt.roofline`.
    """

    batch: int
    before_ms: float
    after_ms: float


@dataclass(frozen=True)
class Report:
    """Everything that is known about one result.

    MACs are multiply-accumulates for one sample; `weight_bytes` is what the graph's weights take,
    `files` maps each file of the engine folder to its bytes. `pending` says what is still to be
    done elsewhere, or "".
    """

    model: str = ""
    target: str = ""
    recipe: str = ""
    version: str = ""
    environment: dict[str, str | int] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    macs_before: int = 0
    macs_after: int = 0
    weight_bytes: int = 0
    peak_rss_mb: float | None = None
    files: dict[str, int] = field(default_factory=dict)
    quality: tuple[Quality, ...] = ()
    latency: tuple[Latency, ...] = ()
    estimates: tuple[Estimate, ...] = ()
    pending: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON types; a figure that is no finite number becomes None."""
        record: dict[str, Any] = json_ready(asdict(self))
        return record

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "Report":
        """Read the record back; an unknown field or a wrong type is an UnsafeFileError."""
        read: Report = _read(Report, record, "report")
        return read

    def text(self, width: int = 80) -> str:
        """Return the report as plain text of at most `width` columns, without colour codes."""
        from effopt.report_text import render

        return render(self, width)

    def html(self) -> str:
        """Return the report as one self-contained HTML page."""
        from effopt.report_html import render

        return render(self)


def _read(kind: Any, record: Any, place: str) -> Any:
    """Read one dataclass from a JSON object, field by field, by the types of its fields."""
    if not isinstance(record, Mapping):
        raise _damaged(place, record)
    hints = get_type_hints(kind)
    known = {item.name for item in fields(kind)}
    extra = sorted(set(record) - known)
    if extra:
        raise UnsafeFileError(f"the report is damaged: {place} has no field {extra[0]!r}")
    values = {name: _convert(hints[name], item, f"{place}.{name}") for name, item in record.items()}
    try:
        return kind(**values)
    except TypeError as error:  # a field without a default is missing
        raise UnsafeFileError(f"the report is damaged: {place}: {error}") from error


def _convert(hint: Any, value: Any, place: str) -> Any:
    """Read one value as the type says; anything else is an UnsafeFileError."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return _read(hint, value, place)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(inner[0], item, f"{place}[{n}]") for n, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(inner[1], item, f"{place}.{key}") for key, item in value.items()}
    if origin is UnionType:
        return _one_of(inner, value, place)
    if hint is float and type(value) in (int, float):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise _damaged(place, value)


def _one_of(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    if type(value) in kinds:
        return value
    return _convert(kinds[0], value, place)


def _damaged(place: str, value: object) -> UnsafeFileError:
    return UnsafeFileError(f"the report is damaged: {place} is {value!r:.60}")
