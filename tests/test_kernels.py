"""Every kernel: its lowering and its shapes agree with its meaning; golden worked examples."""

import pytest
import torch

from effopt.kernel import kernel, kernels

aten = torch.ops.aten
NAMES = sorted(op._schema.name.split("::")[1] for op in kernels())


@pytest.mark.parametrize("name", NAMES)
def test_lowering_and_shapes_agree_with_the_meaning(name: str) -> None:
    found = kernel(name)
    for sample in found.samples():
        want = found.op(*sample)
        got = found.lowering(*sample)
        for a, b in zip(_flat(want), _flat(got), strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            scale = max(a.abs().max().item(), 1.0)
            assert (a - b).abs().max().item() <= found.tolerance * scale
        torch.library.opcheck(found.op, sample, test_utils=_checks(sample))


def _checks(sample: tuple[object, ...]) -> tuple[str, ...]:
    """Name the checks of torch; that of the schema multiplies inputs, which 8-bit floats cannot."""
    tensors = [part for part in sample if isinstance(part, torch.Tensor)]
    floats8 = any(part.is_floating_point() and part.element_size() == 1 for part in tensors)
    plain = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    return plain if floats8 else ("test_schema", *plain)


def _flat(result: object) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]  # type: ignore[list-item]
