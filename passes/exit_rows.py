"""Rows that fit the heads of exits: a sample that fits a head must not calibrate a threshold."""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from effopt.calibration import Calibration, samples_in
from effopt.program import Program

_BATCH = "batch"


def fit_rows(count: int, share: float, seed: int = 0) -> Tensor:
    """Choose the nearest whole number to a share of `count` samples: bool [count].

    By one permutation; the samples that are not chosen are drawn as at random as those that are.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[order[: round(share * count)]] = True
    return chosen


class Order:
    """The hash of samples in their order: places mean the same ones in each reading of a stream."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def take(self, batch: Iterable[Tensor]) -> None:
        """Add the inputs of a batch."""
        for tensor in batch:
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            self._hash.update(plain.view(torch.uint8).numpy().data)

    def digest(self) -> str:
        """Return the hash so far, in hex digits."""
        return self._hash.hexdigest()


def with_batches(data: Calibration, order: Order) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Yield the flat inputs of each batch and the numbers of its samples, int64 [b]."""
    start = 0
    for batch in data:
        order.take(batch)
        end = start + samples_in(data.program, batch)
        yield batch, torch.arange(start, end)
        start = end


def only(
    program: Program, batch: tuple[Tensor, ...], kept: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Leave samples out of a batch that are not `kept`, bool [b], where a batch may be so small.

    Returns the places of those that are still there: all, in a batch of fixed size.
    """
    places = kept.nonzero().reshape(-1)
    low, _ = program.ranges.get(_BATCH, (len(kept), None))
    if len(places) < low or len(places) == len(kept):
        return batch, torch.arange(len(kept))
    specs = program.signature.inputs
    cut = (
        x.index_select(spec.shape.index(_BATCH), places.to(x.device)) if _BATCH in spec.shape else x
        for spec, x in zip(specs, batch, strict=True)
    )
    return tuple(cut), places
