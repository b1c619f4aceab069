"""What the lossy passes refuse, with the whole message; nothing is touched by a refusal."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from effopt.errors import PreconditionError
from tests import spellings
from tests.check import Check
from tests.programs import made
from tests.spellings import WIDTH, ConformerBlock, Net, ScaledBlock
from tests.thin import thin

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


class Sigmoid(nn.Module):
    """Attention whose weights are no softmax: no rewrite makes a call of it."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.qk(x)
        return x + (h @ h.transpose(1, 2) / 2).sigmoid() @ h


def test_attention_without_a_softmax() -> None:
    Check(Sigmoid(), torch.randn(2, 6, 4)).normal().refuses(
        "merge-tokens{r=2}",
        """
        model: no self-attention call was found, so nothing counts tokens
          remedy: use a transformer, or a recipe without tokens
        """,
    )


LAST = "merge-tokens{r=2,sites=[2]}"
"""No attention follows the last block, so giving all tokens back there would gain nothing."""


UNMENDED: dict[str, str] = {
    "convolution": "conv1d (conv1d.default) at spellings.py: "
    "a convolution or pooling runs over the tokens",
    "grid": "unflatten (unflatten.int) at spellings.py: "
    "a view cuts the tokens into a grid or windows",
    "largest-place": "argmax (argmax.default) at spellings.py: "
    "aten.argmax.default over the tokens has no weighted form",
    "softmax": "softmax (softmax.int) at spellings.py: "
    "a softmax over the tokens outside of an attention call",
    "order": "cumsum (cumsum.default) at spellings.py: it depends on the order of the tokens",
    "shift": "roll (roll.default) at spellings.py: the tokens are shifted",
    "every-other": "slice_2 (slice.Tensor) at spellings.py: every other token is taken",
    "mixing": "linear_12 (linear.default) at spellings.py: a linear layer mixes the tokens",
    "product": "matmul_1 (matmul.default) at spellings.py: "
    "a product mixes the tokens outside of an attention call",
    "norm": "layer_norm_6 (layer_norm.default) at spellings.py: a norm runs over the tokens",
    "joined": "cat (cat.default) at spellings.py: the tokens are joined with others",
    "no-rule": "logcumsumexp (logcumsumexp.default) at spellings.py: "
    "no axis rule for aten.logcumsumexp.default",
}


@pytest.mark.parametrize("case", thin(spellings.WHOLE))
def test_what_cannot_be_mended_names_the_operator(case: str) -> None:
    net(spellings.WHOLE[case]).refuses(LAST, f"{UNMENDED[case]}\n  remedy: {LEAVE}")


@pytest.mark.parametrize("spec", ["merge-tokens{r=2}", "prune-tokens{keep=0.5}"])
def test_a_conformer_is_refused_for_its_convolution_and_not_for_its_gate(spec: str) -> None:
    blocks = [ConformerBlock(3) for _ in range(2)]
    Check(Net(spellings.mean, blocks=blocks), torch.randn(2, 12, WIDTH)).normal().refuses(
        spec,
        f"""
        conv1d (conv1d.default) in blocks.0.deep at conv.py: \
a convolution or pooling runs over the tokens
          remedy: {LEAVE}
        """,
    )


class Causal(nn.Module):
    """One block of causal attention, and an MLP after it."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.up = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.qk(x).unsqueeze(1)
        x = x + scaled_dot_product_attention(h, h, h, is_causal=True).squeeze(1)
        return x + self.up(x)


def test_merging_under_causal_attention() -> None:
    Check(Causal(), torch.randn(2, 6, 4)).normal().refuses(
        "merge-tokens{r=2}",
        f"""
        {SDPA} at test_refusals.py: attention is causal, and a merged token would show what \
comes later
          remedy: drop tokens in place of merging them, or pass a boolean padding mask
        """,
    )


def test_fusing_under_causal_attention() -> None:
    Check(Causal(), torch.randn(2, 6, 4)).normal().refuses(
        "prune-tokens{keep=0.5,fuse=true}",
        f"""
        {SDPA} at test_refusals.py: a fused token goes last, where causal attention hides it
          remedy: use fuse=false
        """,
    )


def masked(mask: Tensor) -> Check:
    blocks = [ScaledBlock(bias=mask) for _ in range(3)]
    return Check(Net(spellings.first_token, blocks=blocks), torch.randn(2, 12, WIDTH)).normal()


def test_merging_under_a_mask_that_differs_from_query_to_query() -> None:
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    masked(mask).refuses(
        "merge-tokens{r=2}",
        f"""
        {SDPA} in blocks.0.attn at spellings.py: a mask that differs from query to query \
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


def test_a_second_merge_does_not_know_the_sizes_of_the_first() -> None:
    net(spellings.mean).run("merge-tokens{r=3,sites=[0]}").refuses(
        "merge-tokens{r=3,sites=[1]}",
        """
        scaled_dot_product_attention_1 (scaled_dot_product_attention.default) in blocks.1.attn \
at spellings.py: these tokens were merged before, and a second pass does not know their sizes
          remedy: merge at all sites in one pass: name them in its option sites
        """,
    )


def test_a_token_axis_that_does_not_exist() -> None:
    for spec in ("merge-tokens{r=2,axis=text.tokens}", "prune-tokens{keep=0.5,axis=text.tokens}"):
        net(spellings.mean).refuses(
            spec,
            """
            unknown token axis 'text.tokens'
              remedy: did you mean 'tokens'?
            """,
        )


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
