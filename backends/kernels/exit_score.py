"""exit_score: how sure a model is at an exit, one number a row; larger is surer.

The criteria are those of BranchyNet (entropy, arXiv 1709.01686), DeeBERT (2004.12993), PABEE
(patience, 2006.04152) and CALM (maximum, margin and saturation, 2207.07061).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.fx import Node

from effopt.axes import AxisMap, Dims
from effopt.backends.kernels.common import alike
from effopt.errors import UsageError
from effopt.kernel import Kernel

MOST = torch.finfo(torch.float32).max
"""Scores are finite, so that a threshold of infinity is never reached."""


@torch.library.custom_op("effopt::exit_score", mutates_args=())
def exit_score(values: list[Tensor], kind: str) -> Tensor:
    """Return the scores [B] float32 of the last of `values`, each [B, ..., C] of one shape.

    What lies between rows and channels is positions: a row is as sure as its least sure position.
    With p = softmax(z) of the logits z that come last, `kind` is

    - "max": the largest p.
    - "margin": the difference of the two largest z; "probability-margin": of the two largest p.
    - "entropy": 1 + sum(p log p) / log C, from 0 for no idea to 1 for certainty.
    - "patience": how many exits in a row, this one the last, give the same largest logit; `values`
      are the logits of this exit and of all ahead of it.
    - "saturation": the cosine of the last two of `values`, which are features.

    NaN is the least score. Raises UsageError for another kind or too few values or channels.
    """
    _check(values, kind)
    return _score(values, kind)


@exit_score.register_fake
def _(values: list[Tensor], kind: str) -> Tensor:
    _check(values, kind)
    return values[-1].new_empty((values[-1].shape[0],), dtype=torch.float32)


def lowering(values: list[Tensor], kind: str) -> Tensor:
    """Compute what the operator means."""
    return _score(values, kind)


def _score(values: list[Tensor], kind: str) -> Tensor:
    made = KINDS[kind](*(value.float() for value in values))
    made = torch.where(made.isnan(), -MOST, made.clamp(-MOST, MOST))
    return made.flatten(1).amin(dim=1) if made.ndim > 1 else made


# --- kinds: what they say of each position ------------------------------------------------------


def _max(*logits: Tensor) -> Tensor:
    return logits[-1].softmax(-1).amax(-1)


def _margin(*logits: Tensor) -> Tensor:
    return _lead(logits[-1])


def _probability_margin(*logits: Tensor) -> Tensor:
    return _lead(logits[-1].softmax(-1))


def _lead(values: Tensor) -> Tensor:
    best = values.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def _entropy(*logits: Tensor) -> Tensor:
    p, count = logits[-1].softmax(-1), logits[-1].shape[-1]
    return 1 + (p * p.clamp_min(1e-30).log()).sum(-1) / torch.tensor(float(count)).log()


def _patience(*logits: Tensor) -> Tensor:
    answer = logits[-1].argmax(-1)
    same = torch.ones_like(answer, dtype=torch.float32)
    total = same
    for earlier in logits[-2::-1]:
        same = same * (earlier.argmax(-1) == answer)
        total = total + same
    return total


def _saturation(*features: Tensor) -> Tensor:
    before, now = features[-2:]
    lengths = before.square().sum(-1) * now.square().sum(-1)
    return (before * now).sum(-1) / lengths.sqrt().clamp_min(1e-12)


KINDS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "max": _max,
        "margin": _margin,
        "probability-margin": _probability_margin,
        "entropy": _entropy,
        "patience": _patience,
        "saturation": _saturation,
    }
)
"""Criteria by name: [B, ..., C] each to [B, ...]."""


def _check(values: list[Tensor], kind: str) -> None:
    if kind not in KINDS:
        raise UsageError(f"exit_score: no kind {kind!r}", f"give one of {', '.join(KINDS)}")
    least = 2 if kind == "saturation" else 1
    channels = values[-1].shape[-1] if values and values[-1].ndim > 1 else 0
    if len(values) < least or channels < 2:
        reason = f"exit_score: {kind} of {len(values)} values of {channels} channels"
        raise UsageError(reason, "give logits or features [B, ..., C] with C from 2")


def axes(found: AxisMap, node: Node) -> Dims:
    """The rows; all values have one shape."""
    return alike(found, node)[:1]


def samples() -> list[tuple[object, ...]]:
    """Each kind, on rows alone and on positions, with ties and with what is not finite."""
    draw = torch.Generator().manual_seed(8)
    rows = [torch.randn(4, 5, generator=draw) for _ in range(3)]
    deep = [torch.randn(2, 3, 6, generator=draw) for _ in range(2)]
    odd = torch.tensor([[1.0, 1.0, 0.0], [float("inf"), 0.0, 0.0], [float("nan"), 0.0, 1.0]])
    found: list[tuple[object, ...]] = [(rows, kind) for kind in KINDS]
    found += [(deep, kind) for kind in KINDS]
    return [*found, ([odd], "max"), ([odd], "margin")]


KERNEL = Kernel(torch.ops.effopt.exit_score.default, lowering, axes, samples, 1e-6)
