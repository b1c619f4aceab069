"""Spool: what an iterator yields once, kept in a temporary file so that it can be read again."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from effopt.errors import EffoptError


@dataclass(frozen=True)
class _Place:
    """Where the bytes of one tensor are."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


class Spool:
    """An iterable of nested tensors out of an iterator, which is read once, as far as asked.

    The bytes of the tensors are in an anonymous temporary file (in TMPDIR), which goes when the
    spool does or the process ends; only nesting, shapes and leaves that are no tensor on the CPU
    are in memory. EffoptError where the file cannot be written.
    """

    def __init__(self, source: Iterator[object]) -> None:
        self._source = source
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="effopt-")  # noqa: SIM115 - kept open
        self._items: list[tuple[list[object], pytree.TreeSpec]] = []

    def __iter__(self) -> Iterator[object]:
        """Yield what was read before, then go on with the source."""
        index = 0
        while index < len(self._items) or self._pull():
            leaves, spec = self._items[index]
            yield pytree.tree_unflatten(map(self._load, leaves), spec)
            index += 1

    def _pull(self) -> bool:
        """Write one more item; False at the end of the source."""
        try:
            item = next(self._source)
        except StopIteration:
            return False
        leaves, spec = pytree.tree_flatten(item)
        self._items.append(([self._store(leaf) for leaf in leaves], spec))
        return True

    def _store(self, leaf: object) -> object:
        if not isinstance(leaf, Tensor) or leaf.device.type != "cpu":
            return leaf
        flat = leaf.detach().contiguous().reshape(-1)
        try:
            start = self._file.seek(0, 2)
            self._file.write(flat.view(torch.uint8).numpy().data)
        except OSError as error:
            raise EffoptError(
                f"the calibration data cannot be kept for a second reading: {error.strerror}",
                "set TMPDIR to a folder with room, or pass a list or a file",
            ) from error
        return _Place(start, leaf.dtype, leaf.shape)

    def _load(self, leaf: object) -> object:
        if not isinstance(leaf, _Place):
            return leaf
        data = bytearray(leaf.shape.numel() * leaf.dtype.itemsize)
        self._file.seek(leaf.start)
        self._file.readinto(data)  # type: ignore[attr-defined]
        if not data:
            return torch.empty(leaf.shape, dtype=leaf.dtype)
        return torch.frombuffer(data, dtype=leaf.dtype).reshape(leaf.shape)
