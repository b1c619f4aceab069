"""Arguments to time kernels on: those of ViT-B with 197 tokens, by the name of the plugin."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

TOKENS, CHANNELS, HEADS, MERGED = 197, 768, 12, 8
BATCHES = (2, 64)
"""Not 1: a value of one sample may be one that all share, which no plugin is launched for."""

Arguments = tuple[Any, ...]


def _hidden(batch: int, kind: torch.dtype, channels: int = CHANNELS) -> Tensor:
    return torch.randn(batch, TOKENS, channels).to(kind)


def _heads(batch: int, kind: torch.dtype) -> Tensor:
    return torch.randn(batch, HEADS, TOKENS, CHANNELS // HEADS).to(kind)


def _size(batch: int) -> Tensor:
    return torch.ones(batch, TOKENS)


def _places(batch: int, kept: int) -> Tensor:
    return torch.stack([torch.randperm(TOKENS)[:kept].sort().values for _ in range(batch)])


def _gather(batch: int, kind: torch.dtype) -> Arguments:
    return _hidden(batch, kind), _places(batch, TOKENS // 2), 1


def _match_merge(batch: int, kind: torch.dtype) -> Arguments:
    metric = _hidden(batch, kind, CHANNELS // HEADS)
    chosen = (MERGED, TOKENS - MERGED, 1, 0, True)
    return metric, _hidden(batch, kind), _size(batch), *chosen


def _attention_row(batch: int, kind: torch.dtype) -> Arguments:
    q, k = _heads(batch, kind), _heads(batch, kind)
    return q, k, None, _size(batch), [0], 0.125, False


def _pool(batch: int, kind: torch.dtype) -> Arguments:
    return _hidden(batch, kind), _size(batch)


def _compact(batch: int, kind: torch.dtype) -> Arguments:
    return _hidden(batch, kind), torch.arange(batch) % 2 == 0


TIMED: Mapping[str, Callable[[int, torch.dtype], Arguments]] = MappingProxyType(
    {
        "GatherTokens": _gather,
        "MatchMerge": _match_merge,
        "AttentionRow": _attention_row,
        "PoolTokens": _pool,
        "CompactRows": _compact,
    }
)
"""A plugin without a row here is checked, but not timed."""
