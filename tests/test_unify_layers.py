"""unify-layers: every spelling of a layer, what must stay, numbers, and a second run."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.check import Check

FORM = "canonicalize,fold-constants,unify-layers,canonicalize"
C, N = 8, 6
Spelling = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """A function of x and two vectors of channels."""

    def __init__(self, function: Spelling) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.w, self.b = nn.Parameter(torch.rand(C) + 0.5), nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def check(function: Spelling, rows: int = 2, dynamic: tuple[str, ...] = ("batch",)) -> Check:
    torch.manual_seed(1)
    return Check(Model(function), torch.randn(rows, N, C) * 3 + 1, dynamic)


def becomes(function: Spelling, line: str, ulps: float = 8) -> None:
    """Expect one node, which `line` describes, in place of a whole function of x."""
    name = line.partition("[")[0]
    done = check(function).run(FORM).after(f"x[batch, {N}, {C}]\n{line}\nreturn {name}")
    done.numbers(ulps).idempotent(FORM)


def stays(function: Spelling) -> None:
    """Expect that nothing is found."""
    check(function).run("canonicalize,fold-constants").run("unify-layers").kept(
        "no other spelling found"
    )


def by_mean(s: Model, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return s.w * (x - mean) / torch.sqrt(variance + 1e-5) + s.b


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


def unbiased(s: Model, x: Tensor) -> Tensor:
    variance = x.var(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5) * s.w + s.b


def eps_outside(s: Model, x: Tensor) -> Tensor:
    deviation = x.std(-1, unbiased=False, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (deviation + 1e-5)


def channels_first(s: Model, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-5)


def other_mean(s: Model, x: Tensor) -> Tensor:
    centred, y = x - x.mean(-1, keepdim=True), x.tanh()
    variance = (y - y.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5)


def l2_norm(s: Model, x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def rms_of_another(s: Model, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.tanh().pow(2).mean(-1, keepdim=True) + 1e-6)


def wrong_cubic(s: Model, x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044 * x**3)))


def quick_gelu(s: Model, x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def squared_relu(s: Model, x: Tensor) -> Tensor:
    return x.relu() ** 2


def gated(s: Model, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x + 1)


def masked_mean(s: Model, x: Tensor) -> Tensor:
    mask = (x > 0).float()
    return (x * mask).sum(1) / mask.sum(1)


def other_count(s: Model, x: Tensor) -> Tensor:
    return x.sum(1) / C


def two_tokens(s: Model, x: Tensor) -> Tensor:
    return x[:, 0:2].flatten(1)


def kept_token(s: Model, x: Tensor) -> Tensor:
    return x[:, 0:1] + x


@pytest.mark.parametrize(
    "spelling",
    [
        *(unbiased, eps_outside, channels_first, other_mean, l2_norm, rms_of_another),
        *(wrong_cubic, quick_gelu, squared_relu, gated),
        *(masked_mean, other_count, two_tokens, kept_token),
    ],
)
def test_what_is_another_layer_stays(spelling: Spelling) -> None:
    stays(spelling)


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


ROOT = math.sqrt(2 / math.pi)
ERF: tuple[Spelling, ...] = (
    lambda s, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    lambda s, x: 0.5 * (x * (torch.erf(x * 0.7071067811865476) + 1)),
    lambda s, x: (1 + torch.erf(math.sqrt(0.5) * x)) * x / 2,
)
TANH: tuple[Spelling, ...] = (
    lambda s, x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
    lambda s, x: x * 0.5 * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    lambda s, x: x * (0.5 * (torch.tanh((x + x * x * x * 0.044715) * ROOT) + 1)),
)
SILU: tuple[Spelling, ...] = (
    lambda s, x: x * torch.sigmoid(x),
    lambda s, x: torch.sigmoid(x) * x,
    lambda s, x: x / (1 + torch.exp(-x)),
)


@pytest.mark.parametrize("spelling", ERF)
def test_gelu(spelling: Spelling) -> None:
    becomes(spelling, f"gelu[batch, {N}, {C}] = gelu(x)")


@pytest.mark.parametrize("spelling", TANH)
def test_gelu_by_tanh(spelling: Spelling) -> None:
    becomes(spelling, f"gelu[batch, {N}, {C}] = gelu(x, approximate=tanh)")


@pytest.mark.parametrize("spelling", SILU)
def test_silu(spelling: Spelling) -> None:
    becomes(spelling, f"silu[batch, {N}, {C}] = silu(x)")


MEAN: tuple[Spelling, ...] = (
    lambda s, x: x.sum(1) / N,
    lambda s, x: x.sum(1) * (1 / N),
    lambda s, x: x.mean([1], keepdim=True).squeeze(1),
    lambda s, x: x.mean(1, keepdim=True)[:, 0],
    lambda s, x: functional.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1),
    lambda s, x: functional.adaptive_avg_pool1d(x.transpose(1, 2), 1).transpose(1, 2)[:, 0],
)
FIRST: tuple[Spelling, ...] = (
    lambda s, x: x[:, 0:1].squeeze(1),
    lambda s, x: x.narrow(1, 0, 1).reshape(-1, C),
    lambda s, x: torch.index_select(x, 1, torch.tensor([0])).squeeze(1),
    lambda s, x: x[:, [0]].flatten(1),
    lambda s, x: x[:, :1][:, 0],
    lambda s, x: x.unbind(1)[0],
)


@pytest.mark.parametrize("spelling", MEAN)
def test_mean_pooling(spelling: Spelling) -> None:
    done = check(spelling).run(FORM).numbers(4).idempotent(FORM)
    (call,) = [n for n in done.program.nodes() if n.op == "call_function"]
    assert (call.target, list(call.args[1])) == (torch.ops.aten.mean.dim, [1])  # type: ignore[arg-type]


@pytest.mark.parametrize("spelling", FIRST)
def test_picking_one_token(spelling: Spelling) -> None:
    done = check(spelling).run(FORM).numbers(1).idempotent(FORM)
    (call,) = [n for n in done.program.nodes() if n.op == "call_function"]
    assert (call.target, call.args[1:]) == (torch.ops.aten.select.int, (1, 0))


def test_the_last_token_is_picked_from_the_end() -> None:
    becomes(lambda s, x: x[:, -1:].squeeze(1), f"select[batch, {C}] = select(x, 1, -1)")


def test_pooling_a_dynamic_length() -> None:
    for spelling in (lambda s, x: x.sum(1) / x.shape[1], lambda s, x: x[:, -1:].squeeze(1)):
        done = check(spelling, dynamic=("batch", "length")).run(FORM).numbers(4)
        done.numbers(4, inputs=(torch.randn(3, 11, C),)).idempotent(FORM)
        targets = {n.target for n in done.program.nodes() if n.op == "call_function"}
        assert targets <= {torch.ops.aten.mean.dim, torch.ops.aten.select.int}


def test_pooling_a_grid() -> None:
    def pool(s: Model, x: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(x.reshape(-1, N, 2, 4), 1).flatten(1)

    (
        check(pool)
        .run(FORM)
        .after(
            f"""
            x[batch, {N}, {C}]
            reshape[batch, {N}, 2, 4] = reshape(x, [-1, {N}, 2, 4])
            mean_1[batch, {N}] = mean(reshape, [2, 3])
            return mean_1
            """
        )
        .numbers(4)
        .idempotent(FORM)
    )


def _rotated(pieces: Callable[[Tensor], tuple[Tensor, ...]]) -> Spelling:
    def rotated(s: Model, x: Tensor) -> Tensor:
        first, second = pieces(x)
        return torch.cat((-second, first), -1)

    return rotated


@pytest.mark.parametrize(
    "pieces",
    [
        lambda x: x.chunk(2, -1),
        lambda x: x.split(C // 2, -1),
        lambda x: torch.split(x, [4, 4], 2),
        lambda x: x.tensor_split(2, -1),
        lambda x: (x[..., : C // 2], x[..., C // 2 :]),
        lambda x: (x.narrow(-1, 0, 4), x.narrow(-1, -4, 4)),
    ],
)
def test_halves_are_slices(pieces: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    done = check(_rotated(pieces)).run(FORM).numbers(1).idempotent(FORM)
    calls = [n for n in done.program.nodes() if n.op == "call_function"]
    slices = [n for n in calls if n.target is torch.ops.aten.slice.Tensor]
    assert sorted(n.args[2] % C for n in slices) == [0, 4]  # type: ignore[operator, type-var]
    assert len(calls) == 4


def test_rotating_halves_by_chunk() -> None:
    (
        check(_rotated(lambda x: x.chunk(2, -1)))
        .run(FORM)
        .after(
            f"""
            x[batch, {N}, {C}]
            slice_1[batch, {N}, 4] = slice(x, 2, 0, 4)
            slice_2[batch, {N}, 4] = slice(x, 2, 4, 9223372036854775807)
            neg[batch, {N}, 4] = neg(slice_2)
            cat[batch, {N}, {C}] = cat([neg, slice_1], -1)
            return cat
            """
        )
    )


def test_a_slice_that_may_be_clamped_is_no_select() -> None:
    def early(s: Model, x: Tensor) -> Tensor:
        return x[:, -N - 2 : 1].squeeze(1)

    stays(early)


def test_the_transpose_of_an_input_is_read() -> None:
    stays(lambda s, x: x.transpose(1, 2))


def test_the_note_counts_what_was_found() -> None:
    def block(s: Model, x: Tensor) -> Tensor:
        return by_mean(s, x).mul(0.5).tanh() + x * torch.sigmoid(x)

    check(block).run("canonicalize,unify-layers").noted("1 layer_norm, 1 silu")
