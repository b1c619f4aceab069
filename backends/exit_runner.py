"""Running segments that are files of their own: rows leave between them; free of torch.

Values stay numpy arrays between segments: onnxruntime reads them where they lie. Keeping its own
values made no difference: [1, 197, 384] float32 through two products 0.55 ms as arrays and 0.63 ms
as values, of 8 rows 5.6 and 5.8 ms, of 32 rows 32 and 31 ms (one thread, medians, shared machine).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from effopt.backend import Array, Runner
from effopt.backends.split_record import SegmentFile, Split, read_split
from effopt.exit_flow import Flow, Part
from effopt.signature import Signature

Run = Callable[[list[Array]], list[Array]]


class ExitRunner:
    """All segments: flat arrays in and out, in the signature's order.

    `flow` runs segments one by one, for queues.
    """

    def __init__(
        self,
        folder: Path,
        signature: Signature,
        record: Any,
        opened: Callable[[Path, Signature], Runner],
    ) -> None:
        """Check the record and all files, then open each with `opened`, such as a `Session`.

        Raises UnsafeFileError for a record that does not hold together, and what `opened` does.
        """
        split = read_split(record, signature, folder)
        self.parts = [opened(folder / part.file, part.signature) for part in split.segments]
        self.flow = _flow(split, [part.run for part in self.parts], signature)

    @property
    def place(self) -> str:
        """What does the work, as with `Session`."""
        return str(getattr(self.parts[0], "place", ""))

    @property
    def note(self) -> str:
        """Why it does not run where its target wants it, as with `Session`."""
        return str(getattr(self.parts[0], "note", ""))

    def run(self, inputs: list[Array]) -> list[Array]:
        """Run once, thresholds last; a segment runs on the rows that have not left before it.

        Raises UsageError for inputs that the model cannot take.
        """
        return self.flow.run(inputs)


def _flow(split: Split, runs: Sequence[Run], signature: Signature) -> Flow:
    parts = tuple(_part(part, run) for part, run in zip(split.segments, runs, strict=True))
    inputs = tuple(spec.name for spec in signature.inputs[:-1])
    outputs = tuple(spec.name for spec in signature.outputs)
    return Flow(parts, split.rows, inputs, outputs)


def _part(part: SegmentFile, run: Run) -> Part:
    return Part(part.reads, part.scored, part.answers, part.ready, part.handed, run)
