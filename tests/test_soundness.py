"""Right or refused: models that once came out wrong, each with the oracle that shows it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import effopt
from effopt.errors import EffoptError, PreconditionError
from tests.thin import thin

WIDTH, HEADS, TOKENS = 16, 2, 8
MERGE = "merge-tokens{r=4,sites=[0]}"
PRUNE = "prune-tokens{keep=0.5,sites=[0]}"
Head = Callable[[Tensor, Tensor], object]


class Block(nn.Module):
    """Pre-norm attention and MLP with a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=mask)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Three blocks and a head of the test's own."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = head

    def forward(self, x: Tensor, mask: Tensor | None = None) -> object:
        y = x
        for block in self.blocks:
            y = block(y, mask)
        return self.head(y, x)


def model(head: Head) -> Model:
    torch.manual_seed(0)
    return Model(head).eval()


def duplicates(rows: int = 2) -> Tensor:
    """Every odd token repeats the even one before it: merging four of eight loses nothing."""
    torch.manual_seed(1)
    return torch.randn(rows, TOKENS // 2, WIDTH).repeat_interleave(2, dim=1)


def right_or_refused(head: Head, recipe: str, inputs: object) -> str:
    """Optimise; if that is not refused the outputs must be the original's."""
    made = model(head)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    want = made(*args)
    try:
        got = effopt.optimize(made, args, recipe=recipe)(*args)
    except PreconditionError as refusal:
        return refusal.reason
    for a, b in zip(_leaves(got), _leaves(want), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).abs().max() <= 1e-5
    return ""


def _leaves(found: object) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]  # type: ignore[list-item]


SAME: dict[str, Head] = {
    "mean": lambda y, x: y.mean(1),
    "sum": lambda y, x: y.sum(1),
    "max": lambda y, x: y.amax(1),
    "min": lambda y, x: y.amin(1),
    "tokens": lambda y, x: y,
    "prefix and the rest": lambda y, x: (y[:, 0], y[:, 1:]),
    "gated": lambda y, x: (y * torch.sigmoid(y)).mean(1),
    "a cut range": lambda y, x: y[:, 2:].reshape(y.shape[0], 2, -1, WIDTH).amax(2),
    "long skip": lambda y, x: (y + x).mean(1),
    "weighted by a table": lambda y, x: (y * torch.tensor([1.0, 3.0] * 4)[None, :, None]).sum(1),
}


@pytest.mark.parametrize("name", thin(SAME))
def test_merging_duplicates_changes_nothing(name: str) -> None:
    assert right_or_refused(SAME[name], "merge-tokens{r=3,sites=[0]}", duplicates()) == ""


WHOLE: dict[str, tuple[Head, int]] = {
    "samples are flipped": (lambda y, x: (y + y.flip(0)).amax(1), 4),
    "samples are compared": (lambda y, x: y - y[:1], 4),
    "softmax over samples": (lambda y, x: y.softmax(0), 4),
    "mean over samples": (lambda y, x: y - y.mean(0, keepdim=True), 4),
    "flat slice": (lambda y, x: y.flatten(1)[:, :WIDTH], 4),
    "flat output": (lambda y, x: y.flatten(1), 4),
    "pairs are pooled": (lambda y, x: (y @ y.transpose(1, 2)).mean(2), 4),
    "frames of tokens": (lambda y, x: y[:, 1:] - y[:, :-1], 2),
}
"""Heads that read every token in its place, and how many pairs of duplicates may merge."""


@pytest.mark.parametrize("name", WHOLE)
def test_heads_that_need_every_token_get_them_all_back(name: str) -> None:
    head, pairs = WHOLE[name]
    assert right_or_refused(head, f"merge-tokens{{r={pairs},sites=[0]}}", duplicates()) == ""


def test_an_optional_recipe_leaves_out_what_is_refused() -> None:
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    mask[1, ..., 6:] = False
    made, inputs = model(lambda y, x: y.mean(1)), (duplicates(), mask)
    optimized = effopt.optimize(made, inputs, recipe="fast")
    assert "counts padding" in optimized.report.steps[-1].skipped
    assert (optimized(*inputs) - made(*inputs)).abs().max() <= 1e-5


def test_means_keep_their_dtype_in_half_precision() -> None:
    made = model(lambda y, x: y.mean(1)).half()
    x = duplicates().half()
    got = effopt.optimize(made, x, recipe=MERGE)(x)
    assert got.dtype == torch.float16
    assert (got - made(x)).abs().max() <= 2e-2  # 16 roundings of values up to 3 (half: 2e-3 each)


def test_a_mean_over_protected_tokens_is_not_weighted() -> None:
    places = torch.tensor([0, 1, 2, 2, 4, 4, 6, 6])
    x = torch.randn(2, TOKENS, WIDTH)[:, places]
    recipe = "merge-tokens{r=2,sites=[0]}"
    assert right_or_refused(lambda y, x: y[:, :2].mean(1), recipe, x) == ""


def test_a_constant_mask_that_hides_tokens_is_no_bias() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model(lambda y, x: y)
            self.register_buffer("mask", torch.full((TOKENS, TOKENS), -torch.inf).triu(1))

        def forward(self, x: Tensor) -> object:
            return self.inner(x, self.mask)

    with pytest.raises(PreconditionError, match="hides tokens"):
        effopt.optimize(Causal().eval(), duplicates(), recipe=MERGE)


def test_a_padding_mask_per_head_is_refused() -> None:
    mask = torch.ones(2, HEADS, 1, TOKENS, dtype=torch.bool)
    with pytest.raises(PreconditionError, match=r"\[batch, 1, 1, tokens\]"):
        effopt.optimize(model(lambda y, x: y[:, 0]), (duplicates(), mask), recipe=MERGE)


def test_a_plain_mean_over_padded_tokens_is_refused() -> None:
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    mask[1, ..., 6:] = False
    with pytest.raises(PreconditionError, match="counts padding"):
        effopt.optimize(model(lambda y, x: y.mean(1)), (duplicates(), mask), recipe=MERGE)


def test_a_cast_additive_mask_stays_a_mask() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model(lambda y, x: y)

        def forward(self, x: Tensor, keep: Tensor) -> object:
            low = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -1e9)
            return self.inner(x, low.to(x.dtype)[:, None, None])

    keep = torch.ones(2, TOKENS, dtype=torch.bool)
    keep[1, 5:] = False
    made, inputs = Masked().eval(), (duplicates(), keep)
    got = effopt.optimize(made, inputs, recipe="exact")(*inputs)
    assert (got - made(*inputs)).abs().max() <= 1e-5


def test_integers_are_no_booleans() -> None:
    class Bits(nn.Module):
        def forward(self, m: Tensor) -> Tensor:
            return (m & torch.ones_like(m)) * 2

    m = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(effopt.optimize(Bits(), m, recipe="exact")(m), Bits()(m))


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "narrow": lambda h: _then(h, h.narrow(1, 0, 2).mul_(3)),
    "squeeze": lambda h: _then(h, h.squeeze().mul_(3)),
    "chunk": lambda h: h.chunk(2, -1)[0].mul_(2) + h.sum(),
    "view of a view": lambda h: _then(h.view(2, -1).unsqueeze(0), h.mul_(2)),
    "assignment": lambda h: _assigned(h),
    "chain": lambda h: h.add_(1).mul_(2) + h,
}


def _then(result: Tensor, _: Tensor) -> Tensor:
    return result.sum(-1)


def _assigned(h: Tensor) -> Tensor:
    h[:, 0] = 0
    return h.sum(-1)


@pytest.mark.parametrize("name", IN_PLACE)
def test_writing_in_place_is_right_or_refused(name: str) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return IN_PLACE[name](x * 2 + 1)

    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        want = Writes()(x.clone())
        try:
            got = effopt.optimize(Writes(), x, recipe="exact")(x.clone())
        except EffoptError:
            return
    assert (got - want).abs().max() <= 1e-6


def test_registers_joined_in_two_steps_are_protected() -> None:
    class Registers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model(lambda y, x: y[:, 0])
            self.cls, self.reg = (
                nn.Parameter(torch.randn(1, 1, WIDTH)),
                nn.Parameter(torch.randn(1, 2, WIDTH)),
            )

        def forward(self, x: Tensor) -> object:
            b = x.shape[0]
            inner = torch.cat([self.reg.expand(b, -1, -1), x], 1)
            return self.inner(torch.cat([self.cls.expand(b, -1, -1), inner], 1))

    found = effopt.explain(Registers().eval(), duplicates())
    assert (found.axes[0].prefix, found.axes[0].suffix) == (3, 0)


def test_a_gated_mlp_cut_into_halves_is_understood() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model(lambda y, x: y)
            self.up = nn.Linear(WIDTH, 2 * WIDTH)
            self.last = Block()

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            gate, up = self.up(y).chunk(2, dim=-1)
            return self.last(y + F.silu(gate) * up).mean(1)

    x = duplicates()
    made = Gated().eval()
    got = effopt.optimize(made, x, recipe=MERGE)(x)
    assert (got - made(x)).abs().max() <= 1e-5


def test_explain_can_be_called_twice() -> None:
    made, x = model(lambda y, x: y), duplicates()
    assert effopt.explain(made, x) == effopt.explain(made, x)


def test_an_output_that_is_a_parameter_is_returned() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, self.weight

    assert effopt.optimize(Returns(), torch.ones(2, 3), recipe="exact").report.steps
