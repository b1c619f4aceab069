"""merge-tokens on encoders spelled in other ways: each agrees with the eager oracle."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests import spellings
from tests.check import Check
from tests.eager import Tokens, encode, merge
from tests.spellings import WIDTH, ConformerBlock, Net, ParallelBlock, PlacedBlock, ScaledBlock

ULPS = 16
"""Of the largest value: K for dot products of K = 16 terms; both sides in single precision.
Measured: at most 3.9."""

Read = Callable[[Net, Tokens], Tensor]
IMAGES = torch.Size((3, 16, 12))


def agrees(
    net: Net, shape: tuple[int, ...], read: Read, protected: int = 0, behind: int = 0
) -> Check:
    """Merge r tokens in every block, at three batches, and compare with the oracle."""
    check = Check(net, torch.randn(2, *shape)).normal().run("merge-tokens{r=3}")
    steps = {block: merge(3, protected, behind=behind) for block in range(3)}
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape)
        check.numbers(ULPS, inputs=(x,), want=net.oracle(x, steps, read))
    return check


def read_mean(net: Net, tokens: Tokens) -> Tensor:
    return net.head(tokens.mean(tokens.x))


def read_first(net: Net, tokens: Tokens) -> Tensor:
    return net.head(tokens.x[:, 0])


def read_whole(net: Net, tokens: Tokens) -> Tensor:
    return net.head(tokens.whole())


def test_fused_qkv_and_layer_scale_with_mean_pooling() -> None:
    agrees(Net(spellings.mean), (12, 16), read_mean)


def test_every_token_is_restored() -> None:
    agrees(Net(spellings.every_token), (12, 16), read_whole)


def test_a_flattened_grid_without_class_token() -> None:
    agrees(Net(spellings.mean, spellings.grid), IMAGES, read_mean).noted(
        "block 0: 12 -> 9 tokens", "block 1: 9 -> 6 tokens", "block 2: 6 -> 3 tokens"
    )


def test_registers_behind_the_class_token_are_protected() -> None:
    net = Net(lambda net, x: net.head(x[:, 0] + x[:, 3:].mean(1)), spellings.with_registers)
    agrees(
        net,
        IMAGES,
        lambda net, tokens: net.head(tokens.x[:, 0] + tokens.mean(tokens.x, 3)),
        protected=3,
    )


def test_registers_are_protected_though_no_output_tells_them_apart() -> None:
    net = Net(spellings.mean, spellings.with_registers)
    agrees(net, IMAGES, read_mean, protected=3)


def test_patches_alone_are_restored_behind_class_token_and_registers() -> None:
    net = Net(lambda net, x: net.head(x[:, 3:]), spellings.with_registers)
    agrees(net, IMAGES, lambda net, tokens: net.head(tokens.whole()[:, 3:]), protected=3)


def test_the_last_token_is_protected_where_an_output_picks_it() -> None:
    net = Net(lambda net, x: net.head(x[:, -1]))
    agrees(net, (13, 16), lambda net, tokens: net.head(tokens.x[:, -1]), behind=1)


@pytest.mark.parametrize("read", [slice(-2, None), slice(13, None), slice(13, 15)])
def test_detection_tokens_at_the_end_keep_their_places(read: slice) -> None:
    net = Net(lambda net, x: net.head(x[:, read]), spellings.with_detection)

    def detected(net: Net, tokens: Tokens) -> Tensor:
        return net.head(tokens.x[:, -2:])

    agrees(net, IMAGES, detected, protected=1, behind=2)


def test_a_slice_from_the_end_is_restored_where_tokens_merge() -> None:
    net = Net(lambda net, x: net.head(x[:, -12:-2]), spellings.with_registers)
    x = torch.randn(2, *IMAGES)
    check = Check(net, x).normal().run("merge-tokens{r=3,sites=[0]}")
    assert check.program.run((x,))[0].shape == (2, 10, 5)


def test_blocks_with_attention_and_mlp_side_by_side() -> None:
    net = Net(spellings.mean, blocks=[ParallelBlock() for _ in range(3)])
    agrees(net, (12, 16), read_mean)


def test_a_gated_unit_over_channels() -> None:
    net = Net(spellings.mean)
    for block in net.blocks:
        block.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GLU(), nn.Linear(12, WIDTH))
    agrees(net, (12, 16), read_mean)


def test_a_gated_unit_before_a_convolution_of_one_place() -> None:
    agrees(Net(spellings.mean, blocks=[ConformerBlock(1) for _ in range(3)]), (12, 16), read_mean)


def test_a_relative_position_bias_is_gathered_on_both_sides() -> None:
    bias = nn.Parameter(torch.randn(2, 12, 12))
    net = Net(spellings.mean, blocks=[ScaledBlock(bias=bias) for _ in range(3)])
    agrees(net, (12, 16), read_mean)


def test_a_table_of_places_added_in_each_block_is_gathered() -> None:
    net = Net(spellings.mean, blocks=[PlacedBlock() for _ in range(3)])
    x = torch.randn(3, 12, 16)
    check = Check(net, torch.randn(2, 12, 16)).normal().run("merge-tokens{r=3}")
    check.numbers(ULPS, inputs=(x,), want=(_placed(net, x),))


def _placed(net: Net, x: Tensor) -> Tensor:
    """Run the oracle a block at a time, adding each block's table at the representatives."""
    steps = merge(3)
    size, place = torch.ones(len(x), 12), torch.arange(12).expand(len(x), 12)
    with torch.no_grad():
        for block in net.blocks:
            x = x + block.table.expand(len(x), -1, -1).gather(
                1, place[..., None].expand(*place.shape, x.shape[-1])
            )
            tokens = encode(x, size, [block.block()], {0: steps})
            x, size = tokens.x, tokens.size
            place = place.gather(1, tokens.place)
        return net.head((x * size[..., None]).sum(1) / size.sum(1, keepdim=True))


def test_hidden_states_of_every_block_are_restored() -> None:
    class Hidden(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            found = [x]
            for block in self.blocks:
                found.append(block(found[-1]))
            return tuple(found)

    net = Hidden(spellings.every_token)
    x = torch.randn(3, 12, 16)
    blocks = [block.block() for block in net.blocks]
    with torch.no_grad():
        ends = [encode(x, None, blocks[:n], dict.fromkeys(range(n), merge(3))) for n in (1, 2, 3)]
    check = Check(net, torch.randn(2, 12, 16)).normal().run("merge-tokens{r=3}")
    check.numbers(ULPS, inputs=(x,), want=[x, *(tokens.whole() for tokens in ends)])


def test_a_long_skip_is_averaged_as_the_tokens_are() -> None:
    class Skip(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.blocks[1](self.blocks[0](x))
            return self.read(self, self.blocks[2](x + y))

    net = Skip(spellings.mean)
    x = torch.randn(3, 12, 16)
    check = Check(net, torch.randn(2, 12, 16)).normal().run("merge-tokens{r=3,sites=[0]}")
    with torch.no_grad():
        blocks = [block.block() for block in net.blocks]
        y = encode(x, None, blocks[:2], {0: merge(3)})
        # The same groups, for x: the mean over the originals of each token.
        spots = y.undo[0](torch.arange(9.0).expand(3, 9)[..., None])[..., 0]
        onto = (spots[:, None, :] == torch.arange(9)[None, :, None]).float()
        skipped = onto @ x / onto.sum(2, keepdim=True)
        tokens = encode(skipped + y.x, y.size, blocks[2:], {})
        want = net.head(tokens.mean(tokens.x))
    check.numbers(ULPS, inputs=(x,), want=(want,))


@pytest.mark.parametrize(
    ("pool", "want"),
    [
        (lambda x: x.sum(1), lambda t: (t.x * t.size[..., None]).sum(1)),
        (lambda x: x.amax(1), lambda t: t.x.amax(1)),
        (lambda x: x.mean(-2, keepdim=True)[:, 0], lambda t: t.mean(t.x)),
        (lambda x: x.transpose(1, 2).mean(-1), lambda t: t.mean(t.x)),
    ],
    ids=["sum", "max", "mean-from-the-end", "mean-of-channels-first"],
)
def test_poolings_over_tokens(
    pool: Callable[[Tensor], Tensor], want: Callable[[Tokens], Tensor]
) -> None:
    agrees(
        Net(lambda net, x: net.head(pool(x))),
        (12, 16),
        lambda net, tokens: net.head(want(tokens)),
    )


def test_one_block_used_three_times() -> None:
    block = ScaledBlock()
    agrees(Net(spellings.first_token, blocks=[block] * 3), (12, 16), read_first, protected=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("read", [spellings.mean, spellings.first_token, spellings.every_token])
def test_half_precision_stays_half_precision(dtype: torch.dtype, read: spellings.Read) -> None:
    net = Net(read).to(dtype)
    check = Check(net, torch.randn(2, 12, 16, dtype=dtype)).normal().run("merge-tokens{r=3}")
    assert check.program.run(check.program.samples)[0].dtype == dtype
