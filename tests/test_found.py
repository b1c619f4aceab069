"""What review and fuzzing found on the way to any transformer: each is a test by its name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effopt
from effopt.errors import EffoptError, PreconditionError, UsageError
from effopt.pipeline import Pipeline, Step, parse_passes
from tests.oracle.case import captured, make_case
from tests.oracle.checks import faults

WIDTH, TOKENS = 16, 12
Mask = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """A pre-norm block; attends from x to x, or to `other`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        z = y if other is None else other
        q, k, v = (
            part.reshape(*part.shape[:2], 2, 8).transpose(1, 2)
            for part in (self.q(y), self.k(z), self.v(z))
        )
        attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.mlp(x)


class Model(nn.Module):
    """Blocks, with a function of (model, inputs) for how they are run."""

    def __init__(self, run: Callable[..., object], depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.words = nn.Embedding(50, WIDTH)
        self.places = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.between = nn.LayerNorm(WIDTH)
        self.channels = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, *inputs: Tensor) -> object:
        return self.run(self, *inputs)


def x(rows: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, TOKENS, WIDTH)


def padding() -> Tensor:
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, 8:] = 0
    return mask


def judged(run: Callable[..., object], inputs: tuple[Tensor, ...], spec: str) -> str:
    """Return the reason of a refusal, or "" for a program in which the oracle finds no fault."""
    original, normal = captured(Model(run), inputs)
    try:
        case = make_case(original, normal, spec)
    except PreconditionError as refusal:
        return refusal.reason if refusal.remedy else "no remedy"
    assert faults(case) == []
    return ""


def masked(spelling: Mask) -> Callable[..., object]:
    def run(net: Model, ids: Tensor, mask: Tensor) -> Tensor:
        y = net.words(ids) + net.places
        for block in net.blocks:
            y = block(y, spelling(mask[:, None, None, :]))
        return y[:, 0]

    return run


ADDITIVE: dict[str, tuple[Mask, str]] = {
    "(1 - m) * -1e4": (lambda m: (1 - m.float()) * -1e4, ""),
    "(m - 1) * 1e9": (lambda m: (m.float() - 1) * 1e9, ""),
    "-(1 - m) * 1e9": (lambda m: -(1 - m.float()) * 1e9, "made from inputs"),
    "m * 1e9 - 1e9": (lambda m: m * 1e9 - 1e9, "made from inputs"),
    "log(m)": (lambda m: m.float().log(), "made from inputs"),
    "(1 - m) * -1000": (lambda m: (1 - m.float()) * -1000.0, "of unknown values"),
    "a table": (
        lambda m: F.embedding(m, torch.tensor([[-1e9], [0.0]]))[..., 0],
        "of unknown values",
    ),
}


@pytest.mark.parametrize("name", ADDITIVE)
def test_no_spelling_of_a_padding_mask_is_taken_for_a_bias(name: str) -> None:
    spelling, refusal = ADDITIVE[name]
    ids = torch.randint(0, 50, (2, TOKENS))
    run, inputs = masked(spelling), (ids, padding())
    reason = judged(run, inputs, "merge-tokens{r=3}")
    assert (refusal in reason) if refusal else reason == ""
    if not refusal:  # what stands in the place of padding does not matter
        merged = effopt.optimize(Model(run).eval(), inputs, recipe="merge-tokens{r=3}")
        other = ids.masked_fill(padding() == 0, 7)
        torch.testing.assert_close(merged(*inputs), merged(other, padding()))


def test_two_conditions_on_one_input_are_two_masks() -> None:
    def run(net: Model, ids: Tensor) -> Tensor:
        y = net.words(ids) + net.places
        mask = ids.ne(1)[:, None, None] & ids.ne(2)[:, None, None]
        for block in net.blocks:
            y = block(y, mask)
        return y[:, 0]

    def by_layer(net: Model, ids: Tensor) -> Tensor:
        y = net.words(ids) + net.places
        for block, hidden in zip(net.blocks, (1, 1, 2), strict=True):
            y = block(y, ids.ne(hidden)[:, None, None])
        return y[:, 0]

    ids = torch.randint(3, 50, (2, TOKENS))
    ids[1, 8:10], ids[1, 10:] = 2, 1
    assert "two masks" in judged(run, (ids,), "merge-tokens{r=2}")
    assert "share one padding mask" in judged(by_layer, (ids,), "merge-tokens{r=2}")


def test_attention_over_channels_needs_all_tokens() -> None:
    def run(net: Model, y: Tensor) -> Tensor:
        y = net.blocks[0](y)
        y = net.blocks[1](y)
        qkv = net.channels(net.between(y)).reshape(-1, TOKENS, 3, 2, 8).permute(2, 0, 3, 4, 1)
        z = F.scaled_dot_product_attention(*qkv.unbind(0), scale=0.25)
        y = y + z.permute(0, 3, 1, 2).reshape(y.shape)
        return net.blocks[2](y).mean(1)

    for spec in ("merge-tokens{r=3,sites=[0]}", "prune-tokens{keep=0.6,sites=[0]}"):
        judged(run, (x(),), spec)
    reason = judged(run, (x(),), "merge-tokens{r=3,sites=[1]}")
    assert reason == "attention over channels mixes the tokens"


def test_one_padding_mask_does_not_make_two_sequences_one() -> None:
    def run(net: Model, y: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        seen = mask[:, None, None, :].bool()
        y = net.blocks[0](y, seen)
        y = net.blocks[1](y, seen, other=z)
        return net.blocks[2](y, seen)[:, 0]

    inputs = (x(), x().flip(0), padding())
    for spec in ("merge-tokens{r=3,sites=[0]}", "prune-tokens{keep=0.6,sites=[0]}"):
        assert "others that were not" in judged(run, inputs, spec)


BETWEEN: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "a norm": lambda net, y: net.between(y),
    "a scale": lambda net, y: y * 3,
    "a condition": lambda net, y: y + net.between.weight,
    "places": lambda net, y: y + net.places,
}


@pytest.mark.parametrize("name", BETWEEN)
def test_dropped_tokens_do_not_skip_what_maps_all_tokens_between_blocks(name: str) -> None:
    def run(net: Model, y: Tensor) -> Tensor:
        y = net.blocks[1](net.blocks[0](y))
        return net.blocks[2](BETWEEN[name](net, y))

    assert "all tokens are needed" in judged(run, (x(),), "prune-tokens{keep=0.6,sites=[0]}")


def test_a_mask_read_in_blocks_and_in_the_head_has_two_forms() -> None:
    def run(net: Model, y: Tensor, weight: Tensor) -> Tensor:
        for block in net.blocks:
            y = block(y) * weight[..., None]
        return (y * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)

    weight = torch.rand(2, TOKENS) + 0.5
    assert judged(run, (x(), weight), "merge-tokens{r=2,sites=[0]}") == ""


def test_attention_over_a_range_of_the_tokens_counts_the_sizes_of_that_range() -> None:
    def run(net: Model, y: Tensor) -> Tensor:
        y = net.blocks[1](net.blocks[0](y))
        return y[:, 0] + net.blocks[2](y[:, 1:]).mean(1)

    assert judged(run, (x(),), "merge-tokens{r=3,sites=[0]}") == ""


def test_a_choice_that_is_always_made_keeps_its_shape() -> None:
    def run(net: Model, y: Tensor) -> Tensor:
        low = y.mean((1, 2))[:, None, None, None] * 0 - 1e9
        always = (torch.arange(TOKENS) >= 0)[None, None, None, :]
        for block in net.blocks:
            y = block(y, torch.where(always, torch.zeros(1, 1, 1, TOKENS), low))
        return y[:, 0]

    judged(run, (x(),), "merge-tokens{r=2}")


def test_a_mask_that_hides_and_adds_is_read_once() -> None:
    def run(net: Model, y: Tensor, mask: Tensor) -> Tensor:
        bias = torch.linspace(0, 1, TOKENS)[None, None, :].masked_fill(
            mask[:, None] == 0, -torch.inf
        )
        for block in net.blocks:
            y = block(y, bias.unsqueeze(1))
        return y[:, 0]

    _, normal = captured(Model(run), (x(), padding()))
    _, records = Pipeline([Step(parse_passes("simplify-masks")[0])]).run(normal)
    assert not records[0].changed


def test_pruning_down_to_one_token() -> None:
    def run(net: Model, y: Tensor) -> Tensor:
        for block in net.blocks:
            y = block(y)
        return y.mean(1)

    assert judged(run, (x(),), "prune-tokens{keep=0.01}") == ""


def test_sizes_that_depend_on_data_are_each_their_own() -> None:
    def run(net: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = net.words(ids) + net.places
        for block in net.blocks:
            y = block(y)
        return y[:, 0], y[ids == 3].sum(0) + y[ids == 4].sum(0)

    ids = torch.randint(3, 50, (2, TOKENS))
    ids[:, 5], ids[:, 6:8] = 3, 4
    model = Model(run).eval()
    exact = effopt.optimize(model, (ids,), recipe="exact")
    torch.testing.assert_close(exact(ids), model(ids))


def test_tokens_in_the_dimension_named_batch_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with pytest.raises(PreconditionError, match="named batch, counts the tokens"):
        effopt.optimize(model, (torch.randn(TOKENS, 3, WIDTH),), recipe="merge-tokens{r=1}")


def test_a_size_out_of_the_captured_range_is_named() -> None:
    def run(net: Model, ids: Tensor) -> Tensor:
        y = net.words(ids)
        for block in net.blocks:
            y = block(y)
        return y.mean(1)

    ids = torch.randint(0, 50, (2, TOKENS))
    found = effopt.optimize(
        Model(run).eval(), (ids,), recipe="merge-tokens{r=1}", dynamic=("batch", "length")
    )
    with pytest.raises(UsageError, match="length of input"):
        found(ids[:, :1])


def test_a_model_without_a_usable_site_is_refused_by_every_pass() -> None:
    def run(net: Model, y: Tensor) -> Tensor:
        for block in net.blocks:
            y = block(y).cumsum(1)
        return y[:, 0]

    for spec in ("merge-tokens{r=2}", "prune-tokens{keep=0.5}"):
        with pytest.raises(EffoptError, match="order of the tokens"):
            effopt.optimize(Model(run).eval(), (x(),), recipe=spec)


HEADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logsumexp": lambda y, mask: y.masked_fill(mask[..., None] == 0, -1e9).logsumexp(1),
    "masked output": lambda y, mask: y * mask[..., None],
    "softmax pooling": lambda y, mask: (
        y * y[..., :1].masked_fill(mask[..., None] == 0, -1e9).softmax(1)
    ).sum(1),
}


@pytest.mark.parametrize("name", HEADS)
def test_padding_that_merged_is_still_padding_in_the_head(name: str) -> None:
    def run(net: Model, ids: Tensor, mask: Tensor) -> Tensor:
        y = net.words(ids) + net.places
        for block in net.blocks:
            y = block(y, mask[:, None, None, :].bool())
        return HEADS[name](y, mask)

    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, 4:] = 0  # more padding than places that may leave: some of it merges into real tokens
    ids = torch.randint(0, 50, (2, TOKENS))
    merged = effopt.optimize(Model(run).eval(), (ids, mask), recipe="merge-tokens{r=5,sites=[0]}")
    other = ids.masked_fill(mask == 0, 7)
    torch.testing.assert_close(merged(ids, mask), merged(other, mask), rtol=0, atol=1e-4)


def test_padding_stays_hidden_beside_logits_that_are_far_apart() -> None:
    def run(net: Model, ids: Tensor, mask: Tensor) -> Tensor:
        y = net.words(ids) + net.places
        for block in net.blocks:
            y = block(y, mask[:, None, None, :].bool())
        return y[:, 0]

    model = Model(run).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.q.weight.zero_()
            block.q.bias.fill_(200.0)
            block.k.weight.mul_(8)
    ids = torch.randint(0, 50, (2, TOKENS))
    merged = effopt.optimize(model, (ids, padding()), recipe="merge-tokens{r=2}")
    other = ids.masked_fill(padding() == 0, 7)
    torch.testing.assert_close(merged(ids, padding()), merged(other, padding()))


def test_what_cannot_be_counted_does_not_stop_a_conversion() -> None:
    def run(net: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = net.words(ids) + net.places
        for block in net.blocks:
            y = block(y)
        return y[:, 0], net.channels(y[ids == 3]).sum(0)

    ids = torch.randint(3, 50, (2, TOKENS))
    ids[:, 5] = 3
    assert effopt.optimize(Model(run).eval(), (ids,), recipe="exact").report.macs_before == 0


def test_a_mask_that_is_scaled_down_hides_nothing() -> None:
    def run(net: Model, y: Tensor, mask: Tensor) -> Tensor:
        hidden = mask[:, None] == 0
        for block in net.blocks:
            logits = (block.q(y) @ block.k(y).transpose(1, 2)).masked_fill(hidden, -1e4) * 1e-3
            y = y + block.out(logits.softmax(-1) @ block.v(y))
        return y

    model, inputs = Model(run).eval(), (x(), padding())
    exact = effopt.optimize(model, inputs, recipe="exact")
    torch.testing.assert_close(exact(*inputs), model(*inputs), rtol=0, atol=1e-5)
    assert "scaled back" in judged(run, inputs, "merge-tokens{r=2}")


def test_complex_constants_are_no_masks() -> None:
    def run(net: Model, y: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(TOKENS).float(), torch.ones(WIDTH // 2))
        turn = torch.polar(torch.ones_like(angles), angles)
        for block in net.blocks:
            pairs = torch.view_as_complex(y.reshape(*y.shape[:2], -1, 2))
            y = block(torch.view_as_real(pairs * turn).flatten(2))
        return y[:, 0]

    model = Model(run).eval()
    exact = effopt.optimize(model, (x(),), recipe="exact")
    torch.testing.assert_close(exact(x()), model(x()), rtol=0, atol=1e-5)
    for spec in ("merge-tokens{r=2}", "prune-tokens{keep=0.6}"):
        assert judged(run, (x(),), spec) == ""


def test_queries_that_see_nothing_get_the_same_answer_from_the_engine(tmp_path: Path) -> None:
    def run(net: Model, y: Tensor, mask: Tensor) -> Tensor:
        seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & mask[:, None, None, :].bool()
        for block in net.blocks:
            y = block(y, seen)
        return y

    left = padding().flip(1)
    optimized = effopt.optimize(Model(run).eval(), (x(), left), recipe="exact")
    engine = effopt.load(optimized.save(tmp_path / "engine", measure=False))
    want = optimized(x(), left).numpy()
    got = engine(x().numpy(), left.numpy())[0]
    assert abs(got - want).max() <= 1e-4 * abs(want).max()


def test_padding_that_attends_to_nothing_still_does_after_merging() -> None:
    def run(net: Model, y: Tensor, mask: Tensor) -> Tensor:
        real = mask.bool()
        for block in net.blocks:
            y = block(y, real[:, None, :, None] & real[:, None, None, :])
        return y + y.roll(1, 1)  # the first token reads the last one, which is padding

    assert judged(run, (x(), padding()), "merge-tokens{r=2}") == ""


def test_a_picked_token_that_is_padding_keeps_its_value_when_others_merge() -> None:
    def run(net: Model, y: Tensor, mask: Tensor) -> Tensor:
        for block in net.blocks:
            y = block(y, mask[:, None, None, :].bool())
        return y[:, -1]

    assert judged(run, (x(), padding()), "merge-tokens{r=2}") == ""
    net = Model(run).eval()
    merged = effopt.optimize(net, (x(), padding()), recipe="merge-tokens{r=1,sites=[2]}")
    want = net(x(), padding())[1]
    # One pair of the eight real tokens merged in the last block: it moves the others a little.
    assert torch.cosine_similarity(merged(x(), padding())[1], want, dim=0) > 0.99
