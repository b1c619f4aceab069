"""exit-early: what it refuses, where, why, and what to do about it."""

import re
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from effopt.calibration import read_calibration
from effopt.errors import PreconditionError, UsageError
from effopt.passes.exit_early import ExitEarly
from tests.check import Check
from tests.exit_nets import TOKENS, Net, check, data, logits, record_of


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave thresholds at infinity, where the pass puts them: what it does last is another test."""
    monkeypatch.delattr(ExitEarly, "finish")


def refuses(tester: Check, message: str, options: str = "epsilon=0.05") -> None:
    """Expect a message; a line indented deeper than its remedy's continues the last."""
    joined = re.sub(r"\n {2,}(?! *remedy)", " ", dedent(message).strip())
    tester.refuses(f"exit-early{{{options}}}", joined)


def test_no_data() -> None:
    refuses(
        check(count=0),
        """
        model: exits are fitted to data and calibrated on it, and there is none
          remedy: pass calibration=, or --calibration FILE
        """,
    )


def test_exits_that_there_are() -> None:
    tester = check().run("exit-early{epsilon=0.05}")
    refuses(
        tester,
        """
        model: there is an output 'exit_index' already
          remedy: insert exits once, and rename an output of that name
        """,
    )


def test_too_few_cuts() -> None:
    refuses(
        check(),
        """
        model: 3 cuts are asked for, and there are 2 (blocks 0, 1)
          remedy: choose fewer or other cuts: `effopt inspect` lists them
        """,
        "cuts=3",
    )
    refuses(
        check(),
        """
        model: there is no cut behind block 2: there are behind 0, 1
          remedy: choose fewer or other cuts: `effopt inspect` lists them
        """,
        "cuts=[0,2]",
    )


def test_no_cut() -> None:
    class Straight(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ torch.ones(4, 3)).mean(1)

    class Towers(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * super().forward(x.flip(1))

    reasons = {
        "there is no attention call, so no block to stop behind": Straight(),
        "the only cut is behind the last block (0)": Net(logits, blocks=1),
        "no value carries all that outputs need: some leave early, or by a way of their own": (
            Towers(logits)
        ),
    }
    for reason, net in reasons.items():
        tester = Check(net, torch.randn(2, TOKENS, 4)).normal()
        refuses(tester, f"model: {reason}\n  remedy: leave exit-early out", "cuts=1")


class Leaving(Net):
    """An output of its own behind the first block."""

    def forward(self, x: Tensor) -> Any:
        first = x + self.up(self.attended(x))
        second = first + self.up(self.attended(first))
        return first[:, 0], self.head(second[:, 0])

    def attended(self, x: Tensor) -> Tensor:
        h = self.qk(x).unsqueeze(1)
        return scaled_dot_product_attention(h, h, h).squeeze(1)


def test_the_last_cut_may_have_blocks_behind_it() -> None:
    tester = Check(Leaving(logits), torch.randn(2, TOKENS, 4)).normal()
    tester.program.calibration = read_calibration(data(), tester.program)
    refuses(
        tester,
        """
        add (add.Tensor) at test_exit_refusals.py: a lens maps to the value behind the last block,
          where there is no cut
          remedy: use head=ridge
        """,
        "cuts=1,head=lens,epsilon=0.05",
    )
    assert [row["block"] for row in record_of(tester, "cuts=1").facts["exits"]] == [0]


def test_outputs_that_no_head_gives() -> None:
    def label(net: Net, x: Tensor) -> Tensor:
        return net.head(x[:, 0]).argmax(-1)

    refuses(
        check(label),
        """
        argmax (argmax.default) at exit_nets.py: output 'output' is int64: no head is fitted
          to that
          remedy: let the model return its scores in place of what is read off them
        """,
    )

    def turned(net: Net, x: Tensor) -> Tensor:
        return net.head(x[:, 0]).T

    refuses(
        check(turned),
        """
        numpy_t (numpy_T.default) at exit_nets.py: the first dimension of output 'output' is
          not the batch
          remedy: let the model return one row for each sample
        """,
    )


def test_an_output_of_one_number_a_row_promises_nothing() -> None:
    """Its largest is always the same one: every row could leave, and the promise would be empty."""

    def one(net: Net, x: Tensor) -> Tensor:
        return net.head(x[:, 0])[:, :1]

    refuses(
        check(one),
        """
        model: no output gives scores of classes (output)
          remedy: let the model return the scores of its classes
        """,
    )
    place = r"loss=disagree compares several numbers a row, and 'output' has one"
    with pytest.raises(PreconditionError, match=place):
        check(one).run("exit-early{epsilon=0.05,cuts=[1],score=saturation}")


def test_saturation_at_the_first_block() -> None:
    refuses(
        check(),
        """
        add_1 (add.Tensor) at exit_nets.py: saturation compares with the block before, and
          the first exit has none
          remedy: name later cuts, or another score
        """,
        "cuts=[0],score=saturation,epsilon=0.05",
    )


def test_a_ridge_head_for_tokens() -> None:
    refuses(
        check(lambda net, x: net.head(x)),
        """
        linear_6 (linear.default) in head at linear.py: output 'output' has tokens: a ridge head
          gives one answer a sample
          remedy: use head=lens
        """,
        "head=ridge,epsilon=0.05",
    )


def test_pools_that_cannot_be_told() -> None:
    say = "say what heads read (pool=first, last, mean or first-mean), or use head=lens"
    seen = torch.ones(TOKENS + 1, TOKENS + 1, dtype=torch.bool).tril()
    place = "add_5 (add.Tensor) at exit_nets.py"
    refuses(
        check(lambda net, x: net.head(x.mean(1)), seen=seen),
        f"{place}: outputs average over tokens, and a mask that differs from query to query has "
        f"no merged form\n  remedy: {say}",
    )
    refuses(
        check(lambda net, x: net.head(x[:, :2].flatten(1)[:, :4])),
        f"{place}: outputs neither pick tokens nor average over them\n  remedy: {say}",
    )


def test_a_place_that_inputs_say() -> None:
    class Marked(Net):
        def forward(self, x: Tensor) -> Any:
            place = x[:, :, 0].argmax(1) + 1
            self.read = lambda net, h: net.head(h[torch.arange(h.shape[0]), place])
            return super().forward(x)

    tester = Check(Marked(logits), torch.randn(2, TOKENS, 4)).normal()
    tester.program.calibration = read_calibration(data(), tester.program)
    refuses(
        tester,
        """
        add_6 (add.Tensor) at exit_nets.py: outputs read a token at a place that the inputs
          say
          remedy: say what heads read (pool=first, last, mean or first-mean), or use head=lens
        """,
    )
    assert record_of(tester, "pool=mean").changed


def test_too_few_samples() -> None:
    refuses(
        check(count=20),
        """
        add_1 (add.Tensor) at exit_nets.py: a head of 8 features wants as many samples to
          fit, and of the 20 of the calibration data 7 fit
          remedy: give more samples, raise share, or read less (pool=first or mean)
        """,
    )
    refuses(
        check(count=90),
        """
        model: ltt with epsilon=0.05 needs 59 samples to calibrate, and of the 90 of the
          calibration data 54 are left for it
          remedy: give more samples, lower share, or allow a larger epsilon
        """,
    )
    refuses(
        check(count=150),
        """
        model: crc with epsilon=0.01 needs 99 samples to calibrate, and of the 150 of the
          calibration data 90 are left for it
          remedy: give more samples, lower share, or allow a larger epsilon
        """,
        "rule=crc",
    )


def test_too_few_tokens_for_a_lens() -> None:
    refuses(
        check(count=2),
        """
        add_5 (add.Tensor) at exit_nets.py: 0 rows that are no padding fit a head of 4
          features
          remedy: give more calibration samples
        """,
        "head=lens,epsilon=0.9,rule=crc,share=0.2",
    )


def test_polish_of_a_lens() -> None:
    refuses(
        check(lambda net, x: net.head(x)),
        """
        add_1 (add.Tensor) at exit_nets.py: polish trains ridge heads, and outputs have
          tokens, which a lens serves
          remedy: leave polish out
        """,
        "polish=5,epsilon=0.05",
    )


def test_values_that_are_no_numbers() -> None:
    tester = check(lambda net, x: net.head(x[:, 0]) / 0 * 0)
    with pytest.raises(PreconditionError, match="NaN or infinity"):
        tester.run("exit-early{epsilon=0.05}")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"score": "margins"}, "unknown score 'margins'"),
        ({"head": "linear"}, "unknown head 'linear'"),
        ({"pool": "max"}, "unknown pool 'max'"),
        ({"rule": "naive"}, "unknown rule 'naive'"),
        ({"loss": "mse"}, "unknown loss 'mse'"),
        ({"reference": "labels"}, "unknown reference 'labels'"),
        ({"unit": "batch"}, "unknown unit 'batch'"),
        ({"lower": "loop"}, "unknown lower 'loop'"),
        ({"cuts": 0}, "cuts is 0"),
        ({"cuts": ()}, "cuts is ()"),
        ({"cuts": (1, 1)}, "cuts is (1, 1)"),
        ({"cuts": (-1,)}, "cuts is (-1,)"),
        ({"share": 1.0}, "share is 1.0"),
        ({"polish": -1}, "polish is -1"),
        ({"head": "lens", "pool": "mean"}, "a lens reads every token, and pool is mean"),
        ({"head": "lens", "polish": 9}, "polish trains ridge heads, and head is lens"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        ExitEarly(**options)
    assert caught.value.reason == reason
    assert caught.value.remedy


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"epsilon": 2.0}, {"delta": 0.0}])
def test_promises_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ExitEarly(**options)


def test_a_rule_without_delta_does_not_read_it() -> None:
    assert ExitEarly(rule="crc", delta=7.0).level is None
