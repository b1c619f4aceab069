"""What review and fuzzing found about masks and padding: each is a test by its name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import effopt
from effopt.pipeline import Pipeline, Step, parse_passes
from tests.judged import TOKENS, WIDTH, Model, judged, padding, x
from tests.oracle.case import captured

Mask = Callable[[Tensor], Tensor]


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


def test_one_padding_mask_does_not_make_two_sequences_one() -> None:
    def run(net: Model, y: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        seen = mask[:, None, None, :].bool()
        y = net.blocks[0](y, seen)
        y = net.blocks[1](y, seen, other=z)
        return net.blocks[2](y, seen)[:, 0]

    inputs = (x(), x().flip(0), padding())
    for spec in ("merge-tokens{r=3,sites=[0]}", "prune-tokens{keep=0.6,sites=[0]}"):
        assert "others that were not" in judged(run, inputs, spec)


def test_a_mask_read_in_blocks_and_in_the_head_has_two_forms() -> None:
    def run(net: Model, y: Tensor, weight: Tensor) -> Tensor:
        for block in net.blocks:
            y = block(y) * weight[..., None]
        return (y * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)

    weight = torch.rand(2, TOKENS) + 0.5
    assert judged(run, (x(), weight), "merge-tokens{r=2,sites=[0]}") == ""


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
