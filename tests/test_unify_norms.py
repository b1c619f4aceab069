"""unify-layers: every spelling of layer_norm and rms_norm, their weights, and their casts."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.check import Check
from tests.layer_forms import FORM, C, Model, N, Spelling, becomes, by_mean, check, stays


def by_var(s: Model, x: Tensor) -> Tensor:
    mean, variance = x.mean(-1, True), x.var(-1, unbiased=False, keepdim=True)
    return s.b + (x - mean) * torch.rsqrt(variance + 1e-5) * s.w


def by_var_mean(s: Model, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (-mean + x) / (1e-5 + variance) ** 0.5 * s.w + s.b


def by_product(s: Model, x: Tensor) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / C
    variance = torch.mean(centred * centred, [2], keepdim=True)
    return s.w * (centred * (variance + 1e-5).rsqrt()) + s.b


def by_parts(s: Model, x: Tensor) -> Tensor:
    return functional.layer_norm(x, (C,)) * s.w + s.b


@pytest.mark.parametrize("spelling", [by_mean, by_var, by_var_mean, by_product, by_parts])
def test_layer_norm(spelling: Spelling) -> None:
    done = check(spelling).run(FORM)
    done.numbers(8).idempotent(FORM)
    (call,) = [n for n in done.program.nodes() if n.op == "call_function"]
    assert call.target is torch.ops.aten.layer_norm.default
    _, size, weight, bias, eps = call.args[:5]
    assert (size, getattr(weight, "target", 0), getattr(bias, "target", 0)) == ([C], "w", "b")
    assert eps == 1e-5


def test_layer_norm_without_weights() -> None:
    def bare(s: Model, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)

    line = f"layer_norm[batch, {N}, {C}] = layer_norm(x, [{C}], None, None, 1e-06)"
    becomes(bare, line)


def llama(s: Model, x: Tensor) -> Tensor:
    y = x.to(torch.float32)
    return s.w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def by_division(s: Model, x: Tensor) -> Tensor:
    return x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-6) * s.w


def by_power(s: Model, x: Tensor) -> Tensor:
    return (x * s.w) * torch.pow(x.square().mean(-1, keepdim=True) + 1e-6, -0.5)


@pytest.mark.parametrize("spelling", [llama, by_division, by_power])
def test_rms_norm(spelling: Spelling) -> None:
    done = check(spelling).run(FORM).numbers(8).idempotent(FORM)
    (call,) = [n for n in done.program.nodes() if n.op == "call_function"]
    assert call.target is torch.ops.aten.rms_norm.default
    assert (call.args[1], getattr(call.args[2], "target", 0)) == ([C], "w")
    assert call.args[3] == 1e-6


def test_gemma_s_offset_is_folded_into_the_weight() -> None:
    def gemma(s: Model, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return y * (1.0 + s.w.float())

    line = f"rms_norm_1[batch, {N}, {C}] = rms_norm(x, [{C}], @folded_add_1, 1e-06)"
    becomes(gemma, line)


def test_a_norm_in_float32_keeps_its_casts_where_the_rest_is_half() -> None:
    model = Model(llama).bfloat16()
    (
        Check(model, torch.randn(2, N, C, dtype=torch.bfloat16))
        .run(FORM)
        .after(
            f"""
            x[batch, {N}, {C}]
            to[batch, {N}, {C}] = to(x, torch.float32)
            rms_norm[batch, {N}, {C}] = rms_norm(to, [{C}], None, 1e-06)
            to_1[batch, {N}, {C}] = to(rms_norm, torch.bfloat16)
            mul_1[batch, {N}, {C}] = mul(@w, to_1)
            return mul_1
            """
        )
        .numbers(1)
    )


def test_a_norm_spelled_in_half_stays() -> None:
    model = Model(by_division).half()  # x * x overflows there, and rms_norm would not
    found = Check(model, torch.randn(2, N, C, dtype=torch.float16)).run("canonicalize")
    found.run("unify-layers").kept("no other spelling found")


def test_a_norm_that_others_read_keeps_its_weight_apart() -> None:
    def shared(s: Model, x: Tensor) -> Tensor:
        y = functional.layer_norm(x, (C,))
        return y * s.w + y.tanh()

    stays(shared)
