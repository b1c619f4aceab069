"""unify-layers: products with a weight are linear layers."""

import torch
from torch import Tensor, nn

from tests.check import Check


class Conv1D(nn.Module):
    """A linear layer as GPT-2 writes it: rows flattened, then addmm."""

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.bias = nn.Parameter(torch.randn(6))
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        return torch.addmm(self.bias, flat, self.weight, alpha=self.alpha).reshape(-1, 5, 6)


class Product(nn.Module):
    """x W without a bias, by matmul."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 5, 4)


def test_an_addmm_with_weights_is_a_linear_layer() -> None:
    check = Check(Conv1D(), x()).run("canonicalize,unify-layers,fold-constants")
    check.after(
        """
        x[batch, 5, 4]
        reshape[5*batch, 4] = reshape(x, [-1, 4])
        linear_default[5*batch, 6] = linear(reshape, @folded_t_default, @bias)
        reshape_1[batch, 5, 6] = reshape(linear_default, [-1, 5, 6])
        return reshape_1
        """
    ).numbers(4).idempotent("unify-layers")


def test_a_product_with_a_weight_is_a_linear_layer() -> None:
    Check(Product(), x()).run("unify-layers,fold-constants").after(
        """
        x[batch, 5, 4]
        linear_default[batch, 5, 6] = linear(x, @folded_t_default)
        return linear_default
        """
    ).numbers(4)


def test_scaled_sums_and_products_of_values_are_left_alone() -> None:
    class Values(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.transpose(1, 2)

    Check(Conv1D(alpha=2.0), x()).run("unify-layers").kept("no other spelling found")
    Check(Values(), x()).run("unify-layers").kept("no other spelling found")
