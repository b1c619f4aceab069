"""Masks and biases of attention, in the spellings of many code bases."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.fuzz.spec import Spec

Mask = Callable[[Spec, Tensor, Tensor | None], Tensor | None]
"""Takes x [B, N, C] and the mask input [B, N], 1 at real tokens; what attention adds or hides."""


def _bool(spec: Spec, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    return mask == 0 if spec.call.startswith("mha") else mask.bool()[:, None, None]


def _bool_index(spec: Spec, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    rows = torch.arange(x.shape[0])[:, None, None, None]
    columns = torch.arange(x.shape[1])[None, None, None]
    return (mask > 0)[rows, columns]


def _bool_expand(spec: Spec, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    n = mask.shape[1]
    return mask.to(torch.bool).view(-1, 1, 1, n).expand(-1, 1, n, n)


def _additive(spec: Spec, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    return (1.0 - mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min


def _soft(spec: Spec, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    return (1.0 - mask.unsqueeze(1).unsqueeze(2).float()) * -10000.0


def _outer(spec: Spec, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    return (mask[:, None, :, None] * mask[:, None, None, :]).bool()


def _where(spec: Spec, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    least = torch.full((), torch.finfo(x.dtype).min)
    return torch.where(mask[:, None, None].bool(), torch.zeros(()), least)


def _expand_as(spec: Spec, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    n = x.shape[1]
    hidden = (mask == 0).view(x.shape[0], 1, 1, n)
    scores = x.new_zeros(x.shape[0], spec.heads, n, n)
    return scores.masked_fill(hidden.expand_as(scores), -1e9)


def _written(spec: Spec, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    made = torch.zeros(x.shape[:2])
    made[mask == 0] = -10000.0
    return made[:, None, None]


def _tril(spec: Spec, x: Tensor, mask: Tensor | None) -> Tensor:
    n = x.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    return seen if mask is None else seen & mask.bool()[:, None, None]


def _causal_padded(spec: Spec, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    place = torch.arange(x.shape[1])
    seen = (place[None] <= place[:, None])[None, None] & (mask[:, None, None] != 0)
    return torch.where(seen, 0.0, torch.finfo(x.dtype).min)


def _triu_inf(spec: Spec, x: Tensor, mask: Tensor | None) -> Tensor:
    n = x.shape[1]
    return torch.full((n, n), -torch.inf).triu(1)


def _alibi(spec: Spec, x: Tensor, mask: Tensor | None) -> Tensor:
    place = torch.arange(x.shape[1])
    slope = 0.5 ** torch.arange(1, spec.heads + 1)
    return -(place[:, None] - place[None]).abs()[None, None] * slope[:, None, None]


MASKS: dict[str, Mask] = {
    **dict.fromkeys(("none", "causal", "relative"), lambda spec, x, mask: None),
    "bool": _bool,
    "bool_index": _bool_index,
    "bool_expand": _bool_expand,
    "additive": _additive,
    "outer": _outer,
    "soft": _soft,
    "where": _where,
    "expand_as": _expand_as,
    "written": _written,
    "relative_padded": _additive,
    "causal_padded": _causal_padded,
    "tril": _tril,
    "triu_inf": _triu_inf,
    "alibi": _alibi,
}


def zeroed(kind: str, x: Tensor, mask: Tensor | None, token: Tensor) -> Tensor:
    """Overwrite what stands at padding."""
    if kind == "none" or mask is None:
        return x
    real = mask.bool().unsqueeze(-1)
    if kind in ("mul", "mul_each"):
        return x * mask.unsqueeze(-1)
    if kind == "token":
        return torch.where(real, x, token)
    if kind in ("fill", "each"):
        return x.masked_fill(~real, 0.0)
    x = x.clone()
    if kind == "put":
        x[mask == 0] = 0.0
    else:
        x[~real.repeat(1, 1, x.shape[2])] = 0.0
    return x
