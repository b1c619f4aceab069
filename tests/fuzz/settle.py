"""Choices that do not go together are brought together, not thrown away: each rule is one line."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.fuzz.spec import (
    NEEDS_FRONT,
    NEEDS_GRID,
    NEEDS_IDS,
    NEEDS_MASK,
    PADDED,
    Spec,
)

BY_PLACE = ("linear_tokens", "matmul_tokens", "einsum", "table", "index_tokens")
"""Hostile operators that fix the number of tokens."""

SKIPS = ("skip_mean", "skip_tokens", "layers")
"""Heads that read hidden states of one length."""

Rule = tuple[Callable[[Spec], bool], dict[str, Any]]

RULES: tuple[Rule, ...] = (
    # What a second input leaves open.
    (lambda s: s.tower == "same", {"front": 0, "back": 0, "stage": "none"}),
    (lambda s: s.tower != "none", {"free_length": False, "tokens_first": False, "hostile": ()}),
    (lambda s: s.tower != "none", {"window": "none"}),
    (lambda s: s.tower == "dual" and s.out in NEEDS_IDS, {"out": "cls"}),
    (lambda s: s.tower == "joined" and s.source != "text" and s.out in NEEDS_IDS, {"out": "cls"}),
    (lambda s: s.tower not in ("none", "joined") and s.out in NEEDS_MASK, {"out": "mean"}),
    (lambda s: s.tower not in ("none", "joined") and s.mask == "relative_padded", {"mask": "bool"}),
    (lambda s: s.tower not in ("none", "joined") and s.out == "detect", {"out": "spans"}),
    # An image has a grid, and no padding, ids or free length; nothing else has a grid.
    (lambda s: s.source == "vision" and s.mask in PADDED, {"mask": "none"}),
    (lambda s: s.source == "vision" and s.out in NEEDS_MASK, {"out": "mean"}),
    (lambda s: s.source == "vision", {"free_length": False, "zero": "none"}),
    (lambda s: s.source != "vision", {"window": "none"}),
    (lambda s: s.source != "vision" and s.out in NEEDS_GRID, {"out": "tokens"}),
    (lambda s: s.tower != "none" and s.out in NEEDS_GRID, {"out": "hidden"}),
    (lambda s: s.source != "text" and s.tower == "none" and s.out in NEEDS_IDS, {"out": "cls"}),
    # Windows and smaller grids: the grid alone, no table of places, no id of each token.
    (lambda s: s.stage != "none" and s.out in NEEDS_IDS, {"out": "cls"}),
    (lambda s: s.depth < 2 or s.tower != "none" or s.takes_mask, {"stage": "none"}),
    (lambda s: s.stage != "none" or s.window != "none", {"front": 0, "back": 0}),
    (lambda s: s.stage != "none" and s.window == "others", {"window": "first"}),
    (lambda s: s.stage != "none" and s.position == "late", {"position": "learned"}),
    (lambda s: s.stage != "none" or s.window != "none", {"free_length": False, "hostile": ()}),
    (lambda s: s.stage != "none" or s.window != "none", {"tokens_first": False, "mask": "none"}),
    (lambda s: s.stage != "none" and s.out in (*NEEDS_GRID, *SKIPS), {"out": "hidden"}),
    (lambda s: s.stage != "none" and s.source == "vision" and s.grid == (2, 2), {"grid": (4, 3)}),
    # Padding stands at the end: nothing is learned behind or ahead of it.
    (lambda s: s.takes_mask or s.out in NEEDS_IDS, {"front": 0, "back": 0}),
    (lambda s: not s.front and s.out in NEEDS_FRONT, {"out": "mean"}),
    (lambda s: not s.back and s.out == "detect", {"out": "spans"}),
    (lambda s: not s.front and s.position == "rotary_rest", {"position": "rotary"}),
    # nn.MultiheadAttention knows no rotation, and two kinds of masks.
    (
        lambda s: s.call.startswith("mha") and s.mask not in ("none", "bool", "triu_inf"),
        {"mask": "none"},
    ),
    (
        lambda s: s.call.startswith("mha") and s.position.startswith("rotary"),
        {"position": "learned"},
    ),
    (lambda s: s.call != "sdpa" and s.mask == "causal", {"mask": "tril"}),
    # A row that attends to nothing has no answer but where the mask is boolean in the model itself.
    (lambda s: s.call != "sdpa" and s.mask == "outer", {"call": "sdpa"}),
    # Values grow from block to block without a norm, by products as a power of a power.
    (lambda s: s.norm == "none" and s.mlp in ("swiglu", "gated", "conformer"), {"mlp": "gelu"}),
    (lambda s: s.norm == "none" and s.tower not in ("none", "joined"), {"norm": "layer"}),
    (lambda s: s.norm == "none" and s.depth > 2, {"depth": 2}),
    # What fixes the length.
    (lambda s: s.source != "text" or s.mask.startswith("relative"), {"free_length": False}),
    (lambda s: s.free_length and s.position == "rotary_ids", {"position": "rotary"}),
)
"""Where the first holds, the second is set; in this order."""


def settled(spec: Spec) -> Spec:
    """Bring together what does not go together."""
    for holds, fields in RULES:
        if holds(spec):
            spec = replace(spec, **fields)
    kept = tuple(
        (place, name)
        for place, name in spec.hostile
        if place < spec.depth and not (spec.free_length and name in BY_PLACE)
    )
    return replace(spec, hostile=kept)
