"""What the lossy passes refuse, with the whole message; nothing is touched by a refusal."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, scaled_dot_product_attention

from effopt.errors import PreconditionError
from tests import spellings
from tests.check import Check
from tests.eager import merge
from tests.programs import made
from tests.spellings import WIDTH, Net, ScaledBlock

SDPA = "scaled_dot_product_attention (scaled_dot_product_attention.default)"
LEAVE = "leave this block out (options first, last or sites), or keep the model as it is"


def net(read: spellings.Read) -> Check:
    return Check(Net(read), torch.randn(2, 12, WIDTH)).normal()


def test_a_model_without_attention() -> None:
    message = """
        model: no self-attention call was found, so nothing counts tokens
          remedy: use a transformer, or a recipe without tokens
        """
    check = Check(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 6, 4)).normal()
    check.refuses("merge-tokens{r=2}", message).refuses("prune-tokens{keep=0.5}", message)


class Written(nn.Module):
    """Attention written with softmax and products: no call to attention is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.qk(x)
        return x + (h @ h.transpose(1, 2) / 2).softmax(-1) @ h


def test_attention_that_is_written_out() -> None:
    Check(Written(), torch.randn(2, 6, 4)).normal().refuses(
        "merge-tokens{r=2}",
        """
        model: no self-attention call was found, so nothing counts tokens
          remedy: use a transformer, or a recipe without tokens
        """,
    )


def _rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def test_a_convolution_over_the_tokens() -> None:
    kernel = torch.ones(1, WIDTH, 3)
    net(lambda _, x: conv1d(_rows(x), kernel)).refuses(
        "merge-tokens{r=2}",
        f"""
        conv1d (conv1d.default) at spellings.py: a convolution or pooling runs over the tokens
          remedy: {LEAVE}
        """,
    )


def test_a_grid_of_the_tokens() -> None:
    kernel = torch.ones(1, WIDTH, 2, 2)
    net(lambda _, x: conv2d(_rows(x).unflatten(2, (4, 3)), kernel)).refuses(
        "merge-tokens{r=2}",
        f"""
        unflatten (unflatten.int) at spellings.py: a view cuts the tokens into a grid or windows
          remedy: {LEAVE}
        """,
    )


UNMENDED: dict[str, tuple[spellings.Read, str]] = {
    "largest-place": (
        lambda _, x: x.argmax(1),
        "argmax (argmax.default) at spellings.py: "
        "aten.argmax.default over the tokens has no weighted form",
    ),
    "softmax": (
        lambda _, x: x.softmax(1),
        "softmax (softmax.int) at spellings.py: "
        "a softmax over the tokens outside of an attention call",
    ),
    "order": (
        lambda _, x: x.cumsum(1),
        "cumsum (cumsum.default) at spellings.py: it depends on the order of the tokens",
    ),
    "shift": (
        lambda _, x: x.roll(1, 1),
        "roll (roll.default) at spellings.py: the tokens are shifted",
    ),
    "every-other": (
        lambda _, x: x[:, ::2],
        "slice_2 (slice.Tensor) at spellings.py: every other token is taken",
    ),
    "mixing": (
        lambda _, x: nn.functional.linear(_rows(x), torch.ones(5, 12)),
        "linear_12 (linear.default) at spellings.py: a linear layer mixes the tokens",
    ),
    "product": (
        lambda _, x: x @ _rows(x) @ x,
        "matmul_1 (matmul.default) at spellings.py: "
        "a product mixes the tokens outside of an attention call",
    ),
    "norm": (
        lambda _, x: nn.functional.layer_norm(_rows(x), [12]),
        "layer_norm_6 (layer_norm.default) at spellings.py: a norm runs over the tokens",
    ),
    "joined": (
        lambda _, x: torch.cat([x, x[:, :1]], 1),
        "cat (cat.default) at spellings.py: the tokens are joined with others",
    ),
    "no-rule": (
        lambda _, x: x.logcumsumexp(1),
        "logcumsumexp (logcumsumexp.default) at spellings.py: "
        "no axis rule for aten.logcumsumexp.default",
    ),
}


@pytest.mark.parametrize("case", UNMENDED)
def test_what_cannot_be_mended_names_the_operator(case: str) -> None:
    read, reason = UNMENDED[case]
    net(read).refuses("merge-tokens{r=2}", f"{reason}\n  remedy: {LEAVE}")


class Causal(nn.Module):
    """One block of causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.up = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.qk(x).unsqueeze(1)
        x = x + scaled_dot_product_attention(h, h, h, is_causal=True).squeeze(1)
        return x + self.up(x)


def test_causal_attention() -> None:
    message = f"""
        {SDPA} at test_refusals.py: causal attention depends on the order of the tokens
          remedy: {LEAVE}
        """
    check = Check(Causal(), torch.randn(2, 6, 4)).normal()
    check.refuses("merge-tokens{r=2}", message).refuses("prune-tokens{keep=0.5}", message)


def masked(mask: Tensor) -> Check:
    blocks = [ScaledBlock(bias=mask) for _ in range(3)]
    return Check(Net(spellings.first_token, blocks=blocks), torch.randn(2, 12, WIDTH)).normal()


def test_merging_under_a_mask_that_differs_from_query_to_query() -> None:
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    masked(mask).refuses(
        "merge-tokens{r=2}",
        f"""
        {SDPA} in blocks.0.attn at spellings.py: a boolean mask that differs from query to query \
has no merged form
          remedy: drop tokens in place of merging them, or pass a boolean padding mask
        """,
    )


def test_merging_under_a_causal_mask_that_is_added() -> None:
    mask = nn.Transformer.generate_square_subsequent_mask(12)
    with pytest.raises(PreconditionError):
        masked(mask).run("merge-tokens{r=2}")
    masked(mask).run("prune-tokens{keep=0.5}")


class Biased(nn.Module):
    """Attention whose additive mask [B, 1, 1, N] is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.up = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.qk(x).unsqueeze(1)
        x = x + scaled_dot_product_attention(h, h, h, mask).squeeze(1)
        return x + self.up(x)


def test_merging_under_an_additive_mask_from_inputs() -> None:
    Check(Biased(), (torch.randn(2, 6, 4), torch.zeros(2, 1, 1, 6))).normal().refuses(
        "merge-tokens{r=2}",
        f"""
        {SDPA} at test_refusals.py: an additive mask made from inputs may hide tokens, \
which sizes cannot show
          remedy: drop tokens in place of merging them, or pass a boolean padding mask
        """,
    )


def test_pruning_without_a_class_token() -> None:
    net(spellings.mean).refuses(
        "prune-tokens{keep=0.5}",
        f"""
        {SDPA} in blocks.0.attn at spellings.py: no output picks a class token of tokens, \
so nothing says what matters
          remedy: use merge-tokens, which needs none
        """,
    )


def test_pruning_with_dynamic_length() -> None:
    check = Check(*made("bert"), dynamic=("batch", "length")).normal()
    check.refuses(
        "prune-tokens{keep=0.5}",
        f"""
        {SDPA} in bert.encoder.layer.0.attention.self at modeling_bert.py: \
the number of tokens is dynamic: a share of it would count padding
          remedy: leave 'length' out of dynamic, or use merge-tokens
        """,
    )
    check.refuses(
        "merge-tokens{r=0.3}",
        f"""
        {SDPA} in bert.encoder.layer.0.attention.self at modeling_bert.py: \
the number of tokens is dynamic, and a share of it would count padding
          remedy: give r as a whole number, or leave 'length' out of dynamic
        """,
    )


def test_fusing_ahead_of_protected_tokens() -> None:
    model = Net(lambda net, x: net.head(x[:, 0]), spellings.with_detection)
    Check(model, torch.randn(2, 3, 16, 12)).normal().refuses(
        "prune-tokens{keep=0.5,fuse=true}",
        f"""
        {SDPA} in blocks.0.attn at spellings.py: \
a fused token goes last, where protected tokens stand
          remedy: use fuse=false
        """,
    )


def test_tokens_that_were_merged_already() -> None:
    net(spellings.mean).run("merge-tokens{r=2}").refuses(
        "merge-tokens{r=2}",
        f"""
        match_tokens_default (match_tokens.default): \
the tokens are reduced already by an earlier pass
          remedy: {LEAVE}
        """,
    )


def test_a_second_merge_knows_the_sizes_of_the_first_or_is_refused() -> None:
    model = Net(spellings.mean)
    check = Check(model, torch.randn(2, 12, WIDTH)).normal().run("merge-tokens{r=3,sites=[0]}")
    try:
        check.run("merge-tokens{r=3,sites=[1]}")
    except PreconditionError:
        return
    x = torch.randn(3, 12, WIDTH)
    steps = {0: merge(3), 1: merge(3)}
    want = model.oracle(x, steps, lambda net, tokens: net.head(tokens.mean(tokens.x)))
    check.numbers(32, inputs=(x,), want=want)


def test_a_block_that_does_not_exist() -> None:
    for spec in ("merge-tokens{r=2,sites=[0,7]}", "prune-tokens{keep=0.5,sites=[7]}"):
        net(spellings.first_token).refuses(
            spec,
            """
            model: there is no block 7 with self-attention over tokens
              remedy: name blocks among 0, 1, 2
            """,
        )


WRONG: dict[str, str] = {
    "merge-tokens{r=7}": """
        r = 7 is more than half of the 12 tokens at the first site
          remedy: at most 5 can merge there
        """,
    "merge-tokens{r=0.7}": """
        r = 0.7 is more than half of the 12 tokens at the first site
          remedy: at most 5 can merge there
        """,
    "merge-tokens{r=1,sites=[1.5]}": """
        sites names the depth 1.5
          remedy: give a block, or a share from 0 to 1
        """,
}


@pytest.mark.parametrize("spec", WRONG)
def test_numbers_that_do_not_fit_the_model(spec: str) -> None:
    net(spellings.first_token).refuses(spec, WRONG[spec])
