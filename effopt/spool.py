"""Spool and shelf: tensors in a temporary file instead of memory, to be read again."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from effopt.errors import EffoptError


@dataclass(frozen=True, eq=False)
class Kept:
    """A tensor on a shelf: `read` makes it anew."""

    file: IO[bytes]
    start: int
    dtype: torch.dtype
    shape: torch.Size

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own."""
        data = bytearray(self.shape.numel() * self.dtype.itemsize)
        self.file.seek(self.start)
        self.file.readinto(data)  # type: ignore[attr-defined]
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


class Shelf:
    """Keeps tensors of the CPU in an anonymous temporary file (in TMPDIR), not in memory.

    The file goes with the last of what is kept in it, or when the process ends. EffoptError where
    it cannot be written.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="effopt-")  # noqa: SIM115 - kept open

    def put(self, tensor: Tensor) -> Kept:
        """Write a tensor of the CPU."""
        flat = tensor.detach().contiguous().reshape(-1)
        try:
            start = self._file.seek(0, 2)
            self._file.write(flat.view(torch.uint8).numpy().data)
        except OSError as error:
            raise EffoptError(
                f"the calibration data cannot be kept for a second reading: {error.strerror}",
                "set TMPDIR to a folder with room, or pass a list or a file",
            ) from error
        return Kept(self._file, start, tensor.dtype, tensor.shape)


class Spool:
    """An iterable of nested tensors out of an iterator, which is read once, as far as asked.

    The tensors are on a shelf; only nesting, and leaves that are no tensor on the CPU, are in
    memory.
    """

    def __init__(self, source: Iterator[object]) -> None:
        self._source = source
        self._shelf = Shelf()
        self._items: list[tuple[list[object], pytree.TreeSpec]] = []

    def __iter__(self) -> Iterator[object]:
        """Yield what was read before, then go on with the source."""
        index = 0
        while index < len(self._items) or self._pull():
            leaves, spec = self._items[index]
            loaded = (leaf.read() if isinstance(leaf, Kept) else leaf for leaf in leaves)
            yield pytree.tree_unflatten(loaded, spec)
            index += 1

    def fill(self) -> None:
        """Read the source to its end."""
        while self._pull():
            pass

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
        if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
            return self._shelf.put(leaf)
        return leaf
