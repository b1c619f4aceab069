"""prune-tokens: agreement with the eager oracle, fusing, restored outputs, no-ops."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from effopt.errors import UsageError
from effopt.passes.prune_tokens import PruneTokens
from tests import blocks, spellings
from tests.check import Check, agree, text
from tests.eager import Tokens, encode, prune
from tests.programs import draw, made, reduced, run, without_padding
from tests.spellings import WIDTH, Net, ScaledBlock
from tests.thin import thin

PICKS = {"vit": (0,), "deit": (0, 1), "dinov2": (0,), "clip_vision": (0,), "bert": (0,)}
PICKS["roberta"] = (0,)
ULPS = 32
"""Of the largest value, against the oracle in double precision: K for dot products of K = 32 terms.
Measured over all cases here: at most 7.3."""

FUSE = {"": "no", ",fuse=true": "mean", ",fuse=true,normalize=false": "sum"}


def oracle(
    name: str, inputs: dict[str, Tensor], keeps: dict[int, float], fuse: str = "no"
) -> tuple[Tensor, ...]:
    """Prune in eager torch: padding is hidden, attention has no sizes."""
    picks = PICKS[name]
    steps = {block: prune(keep, picks, len(picks), fuse) for block, keep in keeps.items()}
    return blocks.reference(name, made(name)[0], inputs, steps, proportional=False)


@pytest.mark.parametrize("options", FUSE)
@pytest.mark.parametrize("name", PICKS)
def test_pruning_agrees_with_the_eager_oracle(name: str, options: str) -> None:
    program, _ = reduced(name, f"prune-tokens{{keep=0.7{options}}}")
    for batch in (1, 5):
        inputs = draw(name, batch)
        want = oracle(name, inputs, dict.fromkeys(range(3), 0.7), FUSE[options])
        got = run(program, inputs)
        agree(without_padding(got, inputs), without_padding(want, inputs), ULPS)


@pytest.mark.parametrize(
    ("spec", "keeps"),
    [
        ("prune-tokens{keep=0.5,sites=[1]}", {1: 0.5}),
        ("prune-tokens{keep=[0.9,0.4],sites=[0,2]}", {0: 0.9, 2: 0.4}),
        ("prune-tokens{keep=[0.5,1.0],sites=[0,1]}", {0: 0.5}),
        ("prune-tokens{keep=0.4,schedule=linear}", {0: 0.8, 1: 0.6, 2: 0.4}),
        ("prune-tokens{keep=0.01}", dict.fromkeys(range(3), 0.01)),
    ],
)
@pytest.mark.parametrize("name", ["vit", "clip_vision"])
def test_sites_rates_and_schedules(name: str, spec: str, keeps: dict[int, float]) -> None:
    inputs = draw(name, 3)
    agree(run(reduced(name, spec)[0], inputs), oracle(name, inputs, keeps), ULPS)


def test_notes_give_the_counts_rounded_up() -> None:
    assert reduced("vit", "prune-tokens{keep=0.7}")[1] == (
        "block 0: 17 -> 13 tokens",
        "block 1: 13 -> 10 tokens",
        "block 2: 10 -> 8 tokens",
    )
    assert reduced("deit", "prune-tokens{keep=0.7}")[1] == (
        "block 0: 18 -> 14 tokens",
        "block 1: 14 -> 11 tokens",
        "block 2: 11 -> 9 tokens",
    )


def test_a_fused_token_is_a_candidate_at_the_next_site() -> None:
    assert reduced("vit", "prune-tokens{keep=0.7,fuse=true}")[1] == (
        "block 0: 17 -> 14 tokens",
        "block 1: 14 -> 12 tokens",
        "block 2: 12 -> 10 tokens",
    )


def test_keeping_all_leaves_graph_and_outputs_as_they_are() -> None:
    check = Check(*made("vit")).normal()
    before = text(check.program)
    check.run("prune-tokens{keep=1.0}").kept("keep = 1: nothing to prune").before(before)
    check.run(PruneTokens(keep=(1.0, 1.0, 1.0))).kept("keep = 1: nothing to prune")
    for got, want in zip(check.program.run(check.program.samples), check.want, strict=True):
        assert torch.equal(got, want)


def test_a_rate_that_rounds_up_to_all_appends_no_fused_token() -> None:
    check = Check(*made("vit")).normal()
    before = text(check.program)
    check.run("prune-tokens{keep=0.99,fuse=true}").before(before)
    assert not check.records[-1].changed


def test_a_sample_alone_gives_its_row() -> None:
    program, _ = reduced("bert", "prune-tokens{keep=0.7,fuse=true}")
    inputs = draw("bert", 5)
    together = run(program, inputs)[0]
    for row in range(5):
        alone = run(program, {key: x[row : row + 1] for key, x in inputs.items()})
        agree(alone, [together[row : row + 1]], ULPS)


def test_permuting_patches_with_their_places_changes_nothing() -> None:
    net = Net(spellings.first_token)
    x = torch.randn(3, 12, 16)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(11)])
    check = Check(net, torch.randn(2, 12, 16)).normal().run("prune-tokens{keep=0.6}")
    agree(check.program.run((x[:, order],)), check.program.run((x,)), ULPS)


Read = Callable[[Net, Tokens], Tensor]


def agrees(net: Net, read: Read, spec: str, keep: float, fuse: str = "no") -> None:
    """Prune in every block, at three batches, and compare with the oracle."""
    check = Check(net, torch.randn(2, 12, 16)).normal().run(spec)
    steps = {block: prune(keep, (0,), 1, fuse) for block in range(3)}
    for batch in (1, 2, 5):
        x = torch.randn(batch, 12, 16)
        check.numbers(ULPS, inputs=(x,), want=net.oracle(x, steps, read))


def read_first(net: Net, tokens: Tokens) -> Tensor:
    return net.head(tokens.x[:, 0])


@pytest.mark.parametrize("shape", [(2, 12, 12), (1, 2, 12, 12)], ids=["HNN", "1HNN"])
def test_scores_see_a_relative_position_bias(shape: tuple[int, ...]) -> None:
    bias = nn.Parameter(3 * torch.randn(shape))
    net = Net(spellings.first_token, blocks=[ScaledBlock(bias=bias) for _ in range(3)])
    if len(shape) == 4:
        net.oracle = _without_sample(net)  # type: ignore[method-assign]
    agrees(net, read_first, "prune-tokens{keep=0.6}", 0.6)


def _without_sample(net: Net) -> Callable[..., tuple[Tensor, ...]]:
    """Return the oracle of a net whose bias has a dimension of one for the samples."""
    plain = Net(net.read, blocks=[ScaledBlock() for _ in range(3)])
    for own, other in zip(plain.blocks, net.blocks, strict=True):
        own.load_state_dict(other.state_dict(), strict=False)
        own.attn.bias = nn.Parameter(other.attn.bias[0].detach())
    plain.head.load_state_dict(net.head.state_dict())
    return plain.oracle


def test_scores_see_a_mask_of_tokens_by_tokens() -> None:
    mask = torch.rand(12, 12) > 0.4
    mask.fill_diagonal_(True)
    net = Net(spellings.first_token, blocks=[ScaledBlock(bias=mask) for _ in range(3)])
    check = Check(net, torch.randn(2, 12, 16)).normal()
    added = torch.zeros(2, 12, 12).masked_fill(~mask, -1e30)
    for block in net.blocks:
        block.attn.bias = added
    x = torch.randn(3, 12, 16)
    steps = {block: prune(0.6) for block in range(3)}
    want = net.oracle(x, steps, read_first)
    check.run("prune-tokens{keep=0.6}").numbers(ULPS, inputs=(x,), want=want)


def test_scores_see_a_bias_of_keys_alone() -> None:
    bias = nn.Parameter(3 * torch.randn(12))
    net = Net(spellings.first_token, blocks=[ScaledBlock(bias=bias) for _ in range(3)])
    check = Check(net, torch.randn(2, 12, 16)).normal()
    for block in net.blocks:
        del block.attn.bias
        block.attn.bias = bias.detach().expand(2, 12, 12)
    x = torch.randn(3, 12, 16)
    want = net.oracle(x, {block: prune(0.6) for block in range(3)}, read_first)
    check.run("prune-tokens{keep=0.6}").numbers(ULPS, inputs=(x,), want=want)


def _gated(x: Tensor) -> Tensor:
    return x * x.sigmoid()


@pytest.mark.parametrize("options", FUSE)
@pytest.mark.parametrize("then", [lambda x: x, Tensor.tanh, _gated], ids=["as-is", "map", "gate"])
def test_every_token_is_restored(then: Callable[[Tensor], Tensor], options: str) -> None:
    net = Net(lambda net, x: then(x) + net.cls * x[:, 0, :1, None])
    agrees(
        net,
        lambda net, tokens: then(tokens.whole()) + net.cls * tokens.x[:, 0, :1, None],
        f"prune-tokens{{keep=0.6{options}}}",
        0.6,
        FUSE[options],
    )


@pytest.mark.parametrize("options", FUSE)
def test_without_a_class_token_the_attention_of_all_tokens_counts(options: str) -> None:
    net = Net(lambda net, x: net.head(x))
    check = Check(net, torch.randn(2, 12, 16)).normal().run(f"prune-tokens{{keep=0.6{options}}}")
    steps = {block: prune(0.6, (), 0, FUSE[options]) for block in range(3)}
    for batch in (1, 5):
        x = torch.randn(batch, 12, 16)
        want = net.oracle(x, steps, lambda net, tokens: net.head(tokens.whole()))
        check.numbers(ULPS, inputs=(x,), want=want)


def test_padding_has_no_say_where_all_tokens_are_asked() -> None:
    inputs = draw("bert_tokens", 5)
    got = run(reduced("bert_tokens", "prune-tokens{keep=0.6,sites=[0]}")[0], inputs)
    steps = {0: prune(0.6, (), 0)}
    model = made("bert_tokens")[0]
    want = blocks.reference("bert_tokens", model, inputs, steps, proportional=False)
    agree(without_padding(got, inputs), without_padding(want, inputs), ULPS)


@pytest.mark.parametrize("options", FUSE)
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_a_torch_encoder_with_tokens_first(norm_first: bool, options: str) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, norm_first=norm_first)
            self.inner = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.inner(x.transpose(0, 1))
            return y[0], y

    model, x = Both().eval(), torch.randn(3, 12, WIDTH)
    check = Check(model, x[:2]).normal().run(f"prune-tokens{{keep=0.6{options}}}")
    with torch.no_grad():
        steps = dict.fromkeys(range(3), prune(0.6, fuse=FUSE[options]))
        tokens = encode(x, None, blocks.blocks_of_torch(model.inner), steps)
        want = (tokens.x[:, 0], tokens.whole().transpose(0, 1))
    check.numbers(ULPS, inputs=(x,), want=want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", thin(FUSE))
def test_half_precision_stays_half_precision(dtype: torch.dtype, options: str) -> None:
    net = Net(lambda net, x: net.head(x[:, 0] + x[:, 1:].mean(1))).to(dtype)
    check = Check(net, torch.randn(2, 12, 16, dtype=dtype)).normal()
    check.run(f"prune-tokens{{keep=0.6{options}}}")
    assert check.program.run(check.program.samples)[0].dtype == dtype


def test_keep_of_a_wrong_kind_is_told() -> None:
    for keep in (0.0, 1.5, (0.5, 0.0)):
        with pytest.raises(UsageError, match="keep of prune-tokens is"):
            PruneTokens(keep=keep)
    with pytest.raises(UsageError, match="keep lists 2 values for 3 sites"):
        reduced("vit", "prune-tokens{keep=[0.5,0.5]}")
