"""unify-attention: one call for every spelling, the same numbers, and what stays and why."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax

from effopt.attention import SDPA, mask_of, scale_of
from effopt.edit import Edit
from effopt.errors import VerificationError
from effopt.program import Program, module_path, shape, value
from tests.architectures import ARCHITECTURES
from tests.check import Check

FIRST = "canonicalize,fold-constants"
SPEC = "unify-attention"
ROWS, TOKENS, HEADS, WIDTH = 2, 6, 2, 4
LOW = torch.finfo(torch.float32).min
Attend = Callable[["Block", Tensor, Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Attention between projections; `attend` spells what happens to q, k, v [B, H, N, D]."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.table = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS))
        self.register_buffer("causal", torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())
        self.register_buffer("root", torch.tensor(2.0))
        self.register_buffer("low", torch.tensor(LOW))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2) for part in parts)
        y = self.attend(self, q, k, v, keep)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


def hidden(keep: Tensor) -> Tensor:
    """The keys that no query may see, [B, 1, 1, N]."""
    return ~keep[:, None, None, :]


def additive(keep: Tensor) -> Tensor:
    return (1 - keep[:, None, None, :].float()) * LOW


def flat(x: Tensor) -> Tensor:
    """[B, H, N, D] to [B · H, N, D]."""
    return x.reshape(-1, *x.shape[2:])


def apart(x: Tensor) -> Tensor:
    return x.view(-1, HEADS, *x.shape[1:])


def masked_and_flat(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Products in three dimensions, the mask in four, as BART had it."""
    logits = torch.bmm(flat(q), flat(k).transpose(1, 2)) / 2
    logits = flat(apart(logits) + additive(keep))
    return apart(torch.bmm(softmax(logits, -1), flat(v)))


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """Bloom: the bias is the first argument of the product."""
    logits = (
        slopes.expand(q.shape[0], -1, -1, -1)
        .reshape(q.shape[0] * HEADS, 1, TOKENS)
        .baddbmm(batch1=flat(q), batch2=flat(k).transpose(1, 2), beta=1.0, alpha=0.5)
    )
    return apart(torch.bmm(softmax(apart(logits), -1).reshape(-1, TOKENS, TOKENS), flat(v)))


def steady(logits: Tensor) -> Tensor:
    return (logits - logits.amax(-1).unsqueeze(-1)).softmax(-1)


SPELLINGS: dict[str, Attend] = {
    "scale after": lambda m, q, k, v, _: softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v,
    "division": lambda m, q, k, v, _: softmax(q @ k.mT / math.sqrt(WIDTH), -1) @ v,
    "another scale": lambda m, q, k, v, _: softmax(0.3 * (q @ k.mT), -1) @ v,
    "scale on q": lambda m, q, k, v, _: softmax((q * 0.5) @ k.mT, -1) @ v,
    "scale on both": lambda m, q, k, v, _: softmax((q / 2**0.5) @ (k / 2**0.5).mT, -1) @ v,
    "scale on k^T": lambda m, q, k, v, _: softmax(q @ (k.mT / m.root), -1) @ v,
    "a temperature for each head": lambda m, q, k, v, _: (
        softmax(q @ k.mT * m.table[0, :, :1, :1].exp() + m.table, -1) @ v
    ),
    "scale as a tensor": lambda m, q, k, v, _: softmax(q @ k.mT / m.root, -1) @ v,
    "k^T by permute": lambda m, q, k, v, _: (
        softmax(q @ k.transpose(1, 2).permute(0, 2, 3, 1) / 2, -1) @ v
    ),
    "additive padding": lambda m, q, k, v, keep: softmax(q @ k.mT / 2 + additive(keep), -1) @ v,
    "mask first": lambda m, q, k, v, keep: softmax(additive(keep) + q @ k.mT / 2, -1) @ v,
    "masked_fill": lambda m, q, k, v, keep: (
        softmax((q @ k.mT / 2).masked_fill(hidden(keep), -torch.inf), -1) @ v
    ),
    "two masks": lambda m, q, k, v, keep: (
        softmax(torch.where(m.causal, q @ k.mT / 2, m.low).masked_fill(hidden(keep), LOW), -1) @ v
    ),
    "causal table": lambda m, q, k, v, _: (
        softmax(torch.where(m.causal, q @ k.mT / 2, -1e9), -1) @ v
    ),
    "a mask for each query": lambda m, q, k, v, keep: (
        softmax(q @ k.mT / 2 + additive(keep).expand(-1, 1, TOKENS, -1) * 1.0, -1) @ v
    ),
    "relative bias": lambda m, q, k, v, _: softmax(q @ k.mT / 2 + m.table, -1) @ v,
    "scale after the bias": lambda m, q, k, v, _: softmax((q @ k.mT + m.table) / 2, -1) @ v,
    "a bias subtracted": lambda m, q, k, v, _: softmax(q @ k.mT / 2 - m.table[0], -1) @ v,
    "bias and mask": lambda m, q, k, v, keep: (
        softmax((q @ k.mT / 2 + m.table).masked_fill(hidden(keep), LOW), -1) @ v
    ),
    "clamped": lambda m, q, k, v, keep: (
        softmax(torch.max(q @ k.mT / 2 + additive(keep), m.low), -1) @ v
    ),
    "float32 softmax": lambda m, q, k, v, _: (
        softmax((q @ k.mT / 2).float(), -1, dtype=torch.float32).type_as(q) @ v
    ),
    "own maximum": lambda m, q, k, v, _: steady(q @ k.mT / 2) @ v,
    "3-D": lambda m, q, k, v, _: apart(
        torch.bmm(softmax(torch.bmm(flat(q), flat(k).mT) / 2, -1), flat(v))
    ),
    "3-D with a mask in 4-D": lambda m, q, k, v, keep: masked_and_flat(q, k, v, keep),
    "baddbmm": lambda m, q, k, v, _: alibi(q, k, v, m.table[:, :, :1]),
    "einsum": lambda m, q, k, v, _: torch.einsum(
        "bhqk,bhkd->bhqd", softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / 2, -1), v
    ),
    "einsum, tokens first": lambda m, q, k, v, _: torch.einsum(
        "bnij,jbnd->ibnd",
        softmax(
            torch.einsum("ibnd,jbnd->bnij", q.permute(2, 0, 1, 3), k.permute(2, 0, 1, 3)) / 2, -1
        ),
        v.permute(2, 0, 1, 3),
    ).permute(1, 2, 0, 3),
    "repeated heads": lambda m, q, k, v, _: (
        softmax(q @ k[:, :1].repeat_interleave(HEADS, 1).mT / 2, -1)
        @ v[:, :1].repeat_interleave(HEADS, 1)
    ),
    "expanded heads": lambda m, q, k, v, _: (
        softmax(q @ k[:, :1].expand(-1, HEADS, -1, -1).mT / 2, -1) @ v
    ),
    "one head of keys": lambda m, q, k, v, _: softmax(q @ k[:, :1].mT / 2, -1) @ v[:, :1],
}


class Whole(nn.Module):
    """Attention over tokens [B, N, C], with projections of its own."""

    def __init__(self, attend: "Callable[[Whole, Tensor], Tensor]") -> None:
        super().__init__()
        self.attend = attend
        self.width = HEADS * WIDTH
        self.qkv = nn.Linear(self.width, 3 * self.width)
        self.module = nn.MultiheadAttention(self.width, HEADS, batch_first=True)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return x + self.attend(self, x)


def unbound(model: Whole, x: Tensor) -> Tensor:
    joint = model.qkv(x).reshape(x.shape[0], TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    q, k, v = joint.unbind(0)
    return (softmax(q @ k.mT / 2, -1) @ v).transpose(1, 2).reshape(x.shape)


def single(model: Whole, x: Tensor) -> Tensor:
    q, k, v = model.qkv(x).split(model.width, -1)
    return softmax(q @ k.transpose(1, 2) / model.width**0.5, -1) @ v


WHOLE: dict[str, Callable[[Whole, Tensor], Tensor]] = {
    "fused projection, unbound": unbound,
    "a single head in 3-D": single,
    "a 3-D call": lambda m, x: scaled_dot_product_attention(*m.qkv(x).chunk(3, -1)),
    "MultiheadAttention": lambda m, x: m.module(x, x, x, need_weights=False)[0],
    "MultiheadAttention, weights unread": lambda m, x: m.module(x, x, x)[0],
}


def made(name: str) -> nn.Module:
    """Two layers of one spelling."""
    torch.manual_seed(0)
    layer: Callable[[], nn.Module] = (
        (lambda: Block(SPELLINGS[name])) if name in SPELLINGS else (lambda: Whole(WHOLE[name]))
    )
    return Stack(layer(), layer())


class Stack(nn.Module):
    """Layers that share a mask."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, keep)
        return x


def drawn(rows: int) -> tuple[Tensor, Tensor]:
    ends = torch.tensor((6, 4, 5, 3, 6))[-rows:]
    return torch.randn(rows, TOKENS, HEADS * WIDTH), torch.arange(TOKENS)[None] < ends[:, None]


def calls(program: Program) -> list[tuple[int, ...]]:
    """The ranks of the operands of each attention call; no softmax may be left."""
    assert not [node.name for node in program.nodes() if "softmax" in str(node.target)]
    found = [node for node in program.nodes() if node.target is SDPA]
    return [tuple(len(shape(arg)) for arg in node.args[:3]) for node in found]  # type: ignore[arg-type]


def one(attend: Attend) -> Check:
    """One layer of a spelling that has no name here, ready for the pass."""
    torch.manual_seed(0)
    return Check(Block(attend), drawn(ROWS)).run(FIRST)


@pytest.mark.parametrize("name", [*SPELLINGS, *WHOLE])
def test_every_spelling_becomes_one_call(name: str) -> None:
    done = Check(made(name), drawn(ROWS)).run(FIRST).run(SPEC)
    if name != "MultiheadAttention":  # torch writes that one as a call by itself
        assert done.records[-1].notes == ("2 attention calls unified",)
    assert calls(done.program) == [(4, 4, 4)] * 2
    for rows in (1, 2, 5):
        # Products and sums in another order: 1.4 ulps of the largest output were measured.
        done.numbers(12, inputs=drawn(rows))
    done.idempotent(SPEC)
    done.run("simplify-masks,canonicalize,fold-constants").numbers(12, inputs=drawn(5))


class Bare(nn.Module):
    """No projections: short enough to read."""

    def __init__(self, attend: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.attend(x, keep)


def padded(x: Tensor, keep: Tensor) -> Tensor:
    q = x.view(-1, TOKENS, HEADS, WIDTH).transpose(1, 2)
    logits = (q @ q.transpose(2, 3) / 2).masked_fill(~keep[:, None, None], LOW)
    return softmax(logits, -1) @ q


def test_a_filled_mask_becomes_a_condition() -> None:
    (
        Check(Bare(padded), drawn(ROWS))
        .run(FIRST)
        .before(
            """
            x[batch, 6, 8]
            keep[batch, 6]
            view[batch, 6, 2, 4] = reshape(x, [-1, 6, 2, 4])
            transpose[batch, 2, 6, 4] = transpose(view, 1, 2)
            transpose_1[batch, 2, 4, 6] = transpose(transpose, 2, 3)
            matmul[batch, 2, 6, 6] = matmul(transpose, transpose_1)
            div[batch, 2, 6, 6] = div(matmul, 2)
            unsqueeze[batch, 1, 6] = unsqueeze(keep, 1)
            unsqueeze_1[batch, 1, 1, 6] = unsqueeze(unsqueeze, 2)
            bitwise_not[batch, 1, 1, 6] = bitwise_not(unsqueeze_1)
            masked_fill[batch, 2, 6, 6] = masked_fill(div, bitwise_not, -3.4028234663852886e+38)
            softmax[batch, 2, 6, 6] = softmax(masked_fill, -1)
            matmul_1[batch, 2, 6, 4] = matmul(softmax, transpose)
            return matmul_1
            """
        )
        .run(SPEC)
        .after(
            """
            x[batch, 6, 8]
            keep[batch, 6]
            view[batch, 6, 2, 4] = reshape(x, [-1, 6, 2, 4])
            transpose[batch, 2, 6, 4] = transpose(view, 1, 2)
            unsqueeze[batch, 1, 6] = unsqueeze(keep, 1)
            unsqueeze_1[batch, 1, 1, 6] = unsqueeze(unsqueeze, 2)
            attention[batch, 2, 6, 4] = scaled_dot_product_attention(transpose, transpose,
                transpose, unsqueeze_1)
            return attention
            """
        )
        .numbers(12)
    )


def one_head(x: Tensor, keep: Tensor) -> Tensor:
    bias = torch.where(keep, 0.0, -1e9)[:, None]
    return torch.bmm(softmax(torch.bmm(x, x.transpose(1, 2)) * 0.25 + bias, -1), x)


def test_one_head_in_three_dimensions_gets_a_fourth() -> None:
    (
        Check(Bare(one_head), drawn(ROWS))
        .run(FIRST)
        .before(
            """
            x[batch, 6, 8]
            keep[batch, 6]
            where[batch, 6] = where(keep, 0.0, -1000000000.0)
            unsqueeze[batch, 1, 6] = unsqueeze(where, 1)
            transpose[batch, 8, 6] = transpose(x, 1, 2)
            bmm[batch, 6, 6] = bmm(x, transpose)
            mul[batch, 6, 6] = mul(bmm, 0.25)
            add[batch, 6, 6] = add(mul, unsqueeze)
            softmax[batch, 6, 6] = softmax(add, -1)
            bmm_1[batch, 6, 8] = bmm(softmax, x)
            return bmm_1
            """
        )
        .run(SPEC)
        .after(
            """
            x[batch, 6, 8]
            keep[batch, 6]
            where[batch, 6] = where(keep, 0.0, -1000000000.0)
            unsqueeze[batch, 1, 6] = unsqueeze(where, 1)
            unsqueeze_default[batch, 1, 6, 8] = unsqueeze(x, 1)
            unsqueeze_default_1[batch, 1, 6, 8] = unsqueeze(x, 1)
            unsqueeze_default_2[batch, 1, 6, 8] = unsqueeze(x, 1)
            unsqueeze_default_3[batch, 1, 1, 6] = unsqueeze(unsqueeze, 1)
            attention[batch, 1, 6, 8] = scaled_dot_product_attention(unsqueeze_default,
                unsqueeze_default_1, unsqueeze_default_2, unsqueeze_default_3, scale=0.25)
            squeeze_dim[batch, 6, 8] = squeeze(attention, 1)
            return squeeze_dim
            """
        )
        .numbers(12)
    )


LEFT: dict[str, tuple[Attend, str]] = {
    "capped": (
        lambda m, q, k, v, _: softmax(torch.tanh(q @ k.mT / 50) * 50, -1) @ v,
        "tanh (tanh.default) lies between the product and its softmax",
    ),
    "a sink": (
        lambda m, q, k, v, _: (
            softmax(torch.cat([q @ k.mT, m.table[..., :1].expand(q.shape[0], -1, -1, -1)], -1), -1)[
                ..., :-1
            ]
            @ v
        ),
        "cat (cat.default) lies between the product and its softmax",
    ),
    "two products": (
        lambda m, q, k, v, _: softmax(q @ k.mT + k @ q.mT, -1) @ v,
        "disentangled: several products are added up before the softmax",
    ),
    "weights that are changed": (
        lambda m, q, k, v, _: (softmax(q @ k.mT, -1) * m.table) @ v,
        "its weights are read by mul, not by a product",
    ),
    "weights that are read": (
        lambda m, q, k, v, _: (w := softmax(q @ k.mT, -1)) @ v + w.mean((-1, -2), keepdim=True),
        "its weights are read by mean",
    ),
    "logits that are read": (
        lambda m, q, k, v, _: softmax(w := q @ k.mT, -1) @ v + w.mean((-1, -2), keepdim=True),
        "its logits are read by mean",
    ),
    "no product": (
        lambda m, q, k, v, _: softmax(m.table + q.sum(-1, keepdim=True), -1) @ v,
        "its logits are no product of queries and keys",
    ),
    "a mask that is not low": (
        lambda m, q, k, v, _: softmax(torch.where(m.causal, q @ k.mT, -1.0), -1) @ v,
        "where (where.ScalarOther) lies between the product and its softmax",
    ),
    "a mask of weights": (
        lambda m, q, k, v, _: softmax(q @ k.mT * m.table, -1) @ v,
        "mul (mul.Tensor) lies between the product and its softmax",
    ),
    "five dimensions": (
        lambda m, q, k, v, _: (softmax(q[:, None] @ k[:, None].mT, -1) @ v[:, None])[:, 0],
        "its product has 5 dimensions",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_plain_attention_is_left_alone(name: str) -> None:
    attend, reason = LEFT[name]
    done = one(attend).run(SPEC)
    assert not done.records[-1].changed
    first, *rest = done.records[-1].notes
    assert first == "no attention to unify"
    assert [re.sub(r"^softmax \(softmax.int\) at \S+: ", "", note) for note in rest] == [reason]


def test_weights_that_are_an_output_stay() -> None:
    class Shown(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weights = softmax(x @ x.transpose(1, 2), -1)
            return weights @ x, weights

    done = Check(Shown(), drawn(ROWS)[0]).run(FIRST).run(SPEC)
    assert done.records[-1].notes[1].endswith("its weights are an output")


def test_a_condition_is_small_and_a_scale_is_written_only_if_it_is_another() -> None:
    for name, expected in (("scale after", {}), ("another scale", {"scale": 0.3})):
        done = one(SPELLINGS[name]).run(SPEC)
        (call,) = (node for node in done.program.nodes() if node.target is SDPA)
        assert call.kwargs == expected
        assert scale_of(call) == (0.3 if expected else 0.5)
    done = one(SPELLINGS["masked_fill"]).run(SPEC)
    (call,) = (node for node in done.program.nodes() if node.target is SDPA)
    mask = mask_of(call)
    assert mask is not None
    assert value(mask).dtype == torch.bool
    assert shape(mask)[1:] == (1, 1, TOKENS)


def test_an_attempt_that_fails_leaves_no_trace() -> None:
    program = one(SPELLINGS["masked_fill"]).program
    before, edit = program.text(), Edit(program, "test")
    x = program.inputs()[0]
    (weights,) = (node for node in program.nodes() if node.target is torch.ops.aten.softmax.int)

    def attempt(*dim: int) -> None:
        with edit.attempt(weights):
            made = edit.call(torch.ops.aten.neg.default, x)
            edit.call(torch.ops.aten.unsqueeze.default, made, *dim)

    with pytest.raises(VerificationError):
        attempt(7)
    assert (edit.count, program.text()) == (0, before)
    attempt(1)
    assert edit.count == 2


def test_the_call_names_the_module_of_its_softmax() -> None:
    done = Check(made("3-D"), drawn(ROWS)).run(FIRST).run(SPEC)
    found = [module_path(node) for node in done.program.nodes() if node.target is SDPA]
    assert found == ["layers.0", "layers.1"]


EAGER = {
    **{"bert": 3, "t5-encoder": 3, "mpnet": 3, "deberta-v2": 3},
    **{"gpt2": 3, "bart": 6, "bloom": 3, "layoutlmv3": 3},
}
"""Transformers models with their eager attention, and how many calls they make."""

FAST = ("bert", "gpt2")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in EAGER]
)
def test_models_with_eager_attention(name: str) -> None:
    model, given = ARCHITECTURES[name].make()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # type: ignore[operator]
    done = Check(model, given).run(FIRST).run(SPEC)
    assert calls(done.program) == [(4, 4, 4)] * EAGER[name]
    samples = done.program.samples
    for rows in (1, 2, 5):
        inputs = [torch.cat([sample] * 3)[:rows] for sample in samples]
        done.numbers(16, inputs=inputs)  # 6.9 ulps of the largest output were measured
