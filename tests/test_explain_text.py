"""An explanation in words and as JSON."""

import json
import re

import pytest

from effopt.program import place_of, where
from tests.explained import cumulated, explained, of_net, renamed
from tests.programs import captured

GOLDEN = """\
Net
  6.25 k parameters, 61 operators
  input x [batch, 12, 16] float32

tokens: 12 tokens
  made by        x (placeholder)
  protected      none
  outputs        an average over the tokens
  attention      every token sees all, no padding mask
  merge-tokens   possible
  prune-tokens   possible
  sites          blocks 0-1: tokens may leave
                 block 2: no, see 1

Attention calls
  blocks 0-2     blocks.*.attn
                 tokens, 2 heads of 8, no mask

Exits: behind these blocks, one value carries everything
  blocks 0-2     blocks.* (add.Tensor)
                 36 %, 68 %, 100 % of the work is done by then
  in a recipe    exit-early{cuts=[0,1]}, or cuts=N to spread N of them

Groups: layers that share scales of their inputs
  in all         4 by a multiplication, 9 folded
  1 x            stem
                 read placeholder x
                 by a multiplication: it is an input
  3 x            blocks.*.attn.qkv
                 read norm blocks.*.norm1
                 folded into blocks.*.norm1
  3 x            blocks.*.attn.proj
                 read view blocks.*.attn
                 folded into blocks.*.attn.qkv
  3 x            blocks.*.mlp.0
                 read norm blocks.*.norm2
                 folded into blocks.*.norm2
  3 x            blocks.*.mlp.2
                 read pointwise blocks.*.mlp.1
                 by a multiplication: gelu (gelu.default) in blocks.0.mlp.1, and
                 2 more alike

Refusals
  1  it depends on the order of the tokens
     at  cumsum (cumsum.default), file.py
     do  leave this block out (options first, last or sites), or keep the model
         as it is
"""


def test_the_text() -> None:
    shown = re.sub(r", \w+\.py:\d+", ", file.py", of_net(cumulated).text())
    assert shown == GOLDEN


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_text_keeps_to_the_width(width: int) -> None:
    for found in (explained("bert"), of_net(cumulated), renamed(of_net(), "x" * 300)):
        assert max(map(len, found.text(width).splitlines())) <= width


def test_the_record_is_json_with_its_keys() -> None:
    record = json.loads(json.dumps(explained("vit").to_json()))
    assert list(record) == [
        *("model", "parameters", "operators", "attention", "inputs", "axes", "calls", "exits"),
        *("groups", "unknown", "refused"),
    ]
    assert record["attention"] == 3
    site = record["axes"][0]["sites"][0]
    assert list(site) == ["block", "place", "usable", "refusal"]
    assert list(site["place"]) == ["node", "operator", "path", "source"]


def test_places_are_read_back_as_they_were_written() -> None:
    for node in captured("bert").nodes():
        place = place_of(where(node))
        operator = f" ({place.operator})"
        path = f" in {place.path}" if place.path else ""
        source = f" at {place.source}" if place.source else ""
        assert place.node == node.name
        assert f"{place.node}{operator}{path}{source}" == where(node)
    assert place_of("model").node == "model"
    assert place_of("something that is no place").node == "something that is no place"
