"""Roundings of a weight that leave a float: powers of two, two of four, and narrower types."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from effopt.errors import UsageError
from effopt.passes.layer_statistics import LayerStatistics
from effopt.passes.quantization_plan import Plan
from effopt.passes.weight_formats import power_of_two, reconstruct, two_of_four

EXPONENT_BITS = 3
"""Bits of a power of two beside its sign."""


def _powers(weight: Tensor, plan: Plan, seen: LayerStatistics | None) -> Tensor:
    return power_of_two(weight, plan.grid.group, EXPONENT_BITS).values.to(weight.dtype)


def _sparse(weight: Tensor, plan: Plan, seen: LayerStatistics | None) -> Tensor:
    """Keep the weights that matter to the inputs seen, and fit them; else the largest."""
    hessian = None if seen is None else seen.hessian
    if hessian is None:
        return weight * two_of_four(weight)
    mask = two_of_four(weight, hessian.diagonal().sqrt().float())
    return reconstruct(weight, mask, hessian).to(weight.dtype)


def _cast(weight: Tensor, plan: Plan, seen: LayerStatistics | None) -> Tensor:
    kind = getattr(torch, plan.scheme.weights)
    if not torch.isfinite(weight).all():
        raise UsageError("a weight is NaN or infinite", "repair the checkpoint")
    return weight.to(kind)


FLOATS: Mapping[str, Callable[[Tensor, Plan, LayerStatistics | None], Tensor]] = MappingProxyType(
    {"pow2": _powers, "2:4": _sparse, "cast": _cast}
)
"""By the rounding of a scheme: the new values of a weight [N, K], from what its layer reads."""
