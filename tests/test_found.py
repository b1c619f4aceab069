"""What review and fuzzing found about tokens and their sizes: each is a test by its name."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effopt
from effopt.errors import EffoptError, PreconditionError, UsageError
from tests.judged import TOKENS, WIDTH, Model, judged, x


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


def test_attention_over_a_range_of_the_tokens_counts_the_sizes_of_that_range() -> None:
    def run(net: Model, y: Tensor) -> Tensor:
        y = net.blocks[1](net.blocks[0](y))
        return y[:, 0] + net.blocks[2](y[:, 1:]).mean(1)

    assert judged(run, (x(),), "merge-tokens{r=3,sites=[0]}") == ""


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


def test_what_cannot_be_counted_does_not_stop_a_conversion() -> None:
    def run(net: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = net.words(ids) + net.places
        for block in net.blocks:
            y = block(y)
        return y[:, 0], net.channels(y[ids == 3]).sum(0)

    ids = torch.randint(3, 50, (2, TOKENS))
    ids[:, 5] = 3
    assert effopt.optimize(Model(run).eval(), (ids,), recipe="exact").report.macs_before == 0
