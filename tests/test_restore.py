"""Restore: what needs every token in its place gets them all back, right to the last digit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d

from effopt.kernel import kernel
from effopt.sites import find_tokens
from tests import spellings
from tests.check import Check
from tests.eager import Step, Tokens, encode, merge, prune
from tests.fuzz.judge import judge
from tests.fuzz.spec import Spec
from tests.spellings import WIDTH, Net, turned
from tests.thin import thin

ULPS = 32
"""Of the largest value; products of token pairs round most. Measured over all cases here: 4.0."""

TOKENS = 12
MERGE, PRUNE = "merge-tokens{r=2}", "prune-tokens{keep=0.6,sites=[0,1]}"
Heads = Callable[[Net, Tensor], Any]


def check_of(model: nn.Module) -> Check:
    return Check(model, torch.randn(2, TOKENS, WIDTH)).normal()


def front(check: Check) -> int:
    """Return how many tokens the heads protect."""
    (axis,) = check.program.get(find_tokens)
    return axis.prefix


@pytest.mark.parametrize("name", thin(spellings.WHOLE, 3))
def test_a_head_reads_all_tokens_after_merging_and_after_pruning(name: str) -> None:
    """Merged tokens come back as copies, dropped ones with the value that they left with."""
    read = spellings.WHOLE[name]
    net, x = Net(read), torch.randn(3, TOKENS, WIDTH)
    reduced = check_of(net)
    ends = front(reduced)
    runs: dict[str, Step] = {MERGE: merge(2, ends), PRUNE: prune(0.6, (), ends)}
    for spec, step in runs.items():
        want = net.oracle(x, {0: step, 1: step}, lambda net, tokens: read(net, tokens.whole()))
        program = check_of(net).run(spec) if spec == PRUNE else reduced.run(spec)
        program.numbers(ULPS, inputs=(x,), want=want)


@pytest.mark.parametrize("spec", [MERGE, PRUNE])
def test_two_heads_get_all_tokens_and_a_third_those_that_are_left(spec: str) -> None:
    """Dense heads beside a mean: the tokens come back once, and the mean does not wait."""
    net = Net(lambda net, x: (x.cumsum(1), x.softmax(1), net.head(x.mean(1))))
    check, x = check_of(net).run(spec), torch.randn(3, TOKENS, WIDTH)

    def read(net: Net, tokens: Tokens) -> Any:
        left = tokens.mean(tokens.x) if spec == MERGE else tokens.x.mean(1)
        return tokens.whole().cumsum(1), tokens.whole().softmax(1), net.head(left)

    step = merge(2) if spec == MERGE else prune(0.6, (), 0)
    (want,) = net.oracle(x, {0: step, 1: step}, read)
    check.numbers(ULPS, inputs=(x,), want=want)
    ops = [node.target for node in check.program.nodes()]
    restores = {MERGE: ("gather_tokens", 2), PRUNE: ("scatter_tokens", 2)}
    name, count = restores[spec]
    assert ops.count(kernel(name).op) == count, "one map and one gather, or one scatter a site"


def test_dropped_tokens_come_back_with_the_value_that_they_left_with() -> None:
    net = Net(lambda net, x: x.cumsum(1))
    check, x = check_of(net).run("prune-tokens{keep=0.25,sites=[0]}"), torch.randn(2, 12, WIDTH)
    with torch.no_grad():
        (summed,) = check.program.run((x,))
        block = net.blocks[0]
        left = x + block.gain1 * block.attn(block.norm1(x))
    rows = torch.diff(summed, dim=1, prepend=torch.zeros(2, 1, WIDTH))
    frozen = (rows - left).abs().amax(2) < 1e-5
    assert frozen.sum(1).tolist() == [9, 9]


class Middle(Net):
    """A convolution over the tokens between the blocks."""

    def __init__(self, ahead: int, behind: int) -> None:
        blocks = [spellings.ScaledBlock() for _ in range(ahead + behind)]
        super().__init__(spellings.mean, blocks=blocks)
        self.ahead = ahead

    def between(self, x: Tensor) -> Tensor:
        kernel = torch.ones(WIDTH, 1, 3) / 3
        return x + turned(conv1d(turned(x), kernel, padding=1, groups=WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x if number != self.ahead else self.between(x))
        return self.read(self, x)


@pytest.mark.parametrize(("ahead", "behind"), [(3, 1), (1, 3)])
def test_tokens_are_whole_between_two_runs_of_blocks(ahead: int, behind: int) -> None:
    """The longer run is reduced; the other one is as it was."""
    torch.manual_seed(0)
    net = Middle(ahead, behind)
    check = check_of(net)
    (axis,) = check.program.get(find_tokens)
    used = [site.block for site in axis.usable()]
    assert {0, 1} <= {*used} <= {0, 1, 2} if ahead == 3 else used == [1, 2, 3]
    x = torch.randn(3, TOKENS, WIDTH)
    blocks = [block.block() for block in net.blocks]
    steps = dict.fromkeys(used, merge(2))
    with torch.no_grad():
        first = encode(x, None, blocks[:ahead], steps if ahead == 3 else {})
        late = {block - ahead: step for block, step in steps.items()} if ahead == 1 else {}
        last = encode(net.between(first.whole()), None, blocks[ahead:], late)
        want = (net.head(last.mean(last.x)),)
    check.run(MERGE).numbers(ULPS, inputs=(x,), want=want)


def test_the_other_run_of_blocks_says_why_it_is_left_out() -> None:
    (axis,) = check_of(Middle(3, 1)).program.get(find_tokens)
    refusal = axis.sites[-1].refusal
    assert refusal is not None
    assert refusal.reason == (
        "all tokens are needed between this block and the run of blocks that is reduced"
    )


@pytest.mark.parametrize(
    "spec", ["prune-tokens{keep=0.5,sites=[1]}", "merge-tokens{r=2,sites=[1]}"]
)
def test_the_value_that_a_site_reduces_is_known_whole(spec: str) -> None:
    """Here the last norm is the site, in another order of dims than the stream; found by fuzzing.

    Tokens that were dropped there left with the very value that the head reads.
    """
    found = judge(Spec(out="similar", tokens_first=True, order="parallel"), (spec,))
    assert found.faults == {}
    assert spec in found.right


def test_a_site_behind_which_all_tokens_are_needed_is_refused() -> None:
    """Pruning there would drop nothing in the end; found by fuzzing, as a pass without effect."""
    spec = "prune-tokens{keep=0.5}"
    found = judge(Spec(depth=1, front=1, order="parallel", out="tokens_norm"), (spec,))
    assert found.faults == {}
    assert "needs the tokens that leave here, as they were" in found.refusals[spec]
