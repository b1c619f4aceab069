"""The groups found in seven families of decoders, and those that the AWQ authors chose by hand.

By hand: mit-han-lab/llm-awq, awq/quantize/auto_scale.py. What is found beyond them is listed here
with its reason, and shown to be free like all the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as tf

from effopt.capture import capture
from effopt.program import Program, module_path
from effopt.scales import ScaleGroup, find_scales
from tests.architectures.base import scramble
from tests.check import NORMAL
from tests.programs import apply
from tests.scaling import prove
from tests.thin import thin

Settings = dict[str, Any]
By = Mapping[str, str]
"""Layers of a block that share scales ("q k v") → the module that takes the scales up.

After "mul" it is the activation whose result is multiplied: by hand a wrapped activation, which
computes the same as the multiplication here.
"""

IDS: Settings = {"vocab_size": 60, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
SIZES: Settings = {
    **IDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "use_cache": False,
}
GROUPED = "grouped heads: by hand it is left out, as one value channel feeds several inputs"
HAND = "by hand it is left out of this family, for its own code and not for the maths"


@dataclass(frozen=True)
class Family:
    """One block structure: `hand` has the authors' groups, `more` what is found beyond them."""

    model: str
    settings: Settings
    block: str
    hand: By
    more: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)


FAMILIES = {
    "opt": Family(
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
        "model.decoder.layers",
        {
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj": "self_attn_layer_norm",
            "self_attn.out_proj": "self_attn.v_proj",
            "fc1": "final_layer_norm",
            "fc2": "fc1",
        },
    ),
    "llama": Family(
        "LlamaForCausalLM",
        SIZES,
        "model.layers",
        {
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj": "input_layernorm",
            "self_attn.o_proj": "self_attn.v_proj",
            "mlp.gate_proj mlp.up_proj": "post_attention_layernorm",
            "mlp.down_proj": "mlp.up_proj",
        },
    ),
    "llama, grouped heads": Family(
        "LlamaForCausalLM",
        {**SIZES, "num_key_value_heads": 2},
        "model.layers",
        {
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj": "input_layernorm",
            "mlp.gate_proj mlp.up_proj": "post_attention_layernorm",
            "mlp.down_proj": "mlp.up_proj",
        },
        {"self_attn.o_proj": ("tied", "self_attn.v_proj", GROUPED)},
    ),
    "bloom": Family(
        "BloomForCausalLM",
        {**SIZES, "n_layer": 2, "n_head": 4},
        "transformer.h",
        {
            "self_attention.query_key_value": "input_layernorm",
            "mlp.dense_h_to_4h": "post_attention_layernorm",
            "mlp.dense_4h_to_h": "mul mlp.gelu_impl",
        },
        {"self_attention.dense": ("folded", "self_attention.query_key_value", HAND)},
    ),
    "mpt": Family(
        "MptForCausalLM",
        {**IDS, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 40, "use_cache": False},
        "transformer.blocks",
        {
            "attn.Wqkv": "norm_1",
            "attn.out_proj": "attn.Wqkv",
            "ffn.up_proj": "norm_2",
            "ffn.down_proj": "mul ffn.act",
        },
    ),
    "falcon-7b": Family(
        "FalconForCausalLM",
        {**SIZES, "multi_query": True, "alibi": False, "parallel_attn": True},
        "transformer.h",
        {
            "mlp.dense_h_to_4h self_attention.query_key_value": "input_layernorm",
            "mlp.dense_4h_to_h": "mul mlp.act",
        },
        {"self_attention.dense": ("tied", "self_attention.query_key_value", GROUPED)},
    ),
    "falcon-40b": Family(
        "FalconForCausalLM",
        {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
        "transformer.h",
        {
            "self_attention.query_key_value": "ln_attn",
            "mlp.dense_h_to_4h": "ln_mlp",
            "mlp.dense_4h_to_h": "mul mlp.act",
        },
        {"self_attention.dense": ("tied", "self_attention.query_key_value", GROUPED)},
    ),
    "bigcode": Family(
        "GPTBigCodeForCausalLM",
        {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "use_cache": False},
        "transformer.h",
        {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2", "mlp.c_proj": "mul mlp.act"},
        {"attn.c_proj": ("tied", "attn.c_attn", GROUPED)},
    ),
    "neox": Family(
        "GPTNeoXForCausalLM",
        SIZES,
        "gpt_neox.layers",
        {
            "attention.query_key_value": "input_layernorm",
            "mlp.dense_h_to_4h": "post_attention_layernorm",
            "mlp.dense_4h_to_h": "mul mlp.act",
        },
        {"attention.dense": ("folded", "attention.query_key_value", HAND)},
    ),
}


def program_of(family: Family) -> Program:
    kind = getattr(tf, family.model)
    model = kind(kind.config_class(**family.settings))
    scramble(model)
    inputs = {"input_ids": torch.randint(3, 60, (2, 7))}
    return apply(capture(model.eval(), inputs), NORMAL)[0]


def inside(block: str, group: ScaleGroup) -> tuple[frozenset[str], tuple[str, str]]:
    """Write a group by the paths of its modules in a block: its layers, its kind, who scales."""
    by = (group.source,) if group.kind == "mul" else group.producers
    scaled = " ".join(sorted({module_path(node).removeprefix(block) for node in by}))
    layers = frozenset(module_path(node).removeprefix(block) for node in group.linears)
    return layers, (group.kind, scaled)


def expected(family: Family) -> dict[frozenset[str], tuple[str, str]]:
    hand = {
        frozenset(layers.split()): ("mul", by[4:]) if by.startswith("mul ") else ("folded", by)
        for layers, by in family.hand.items()
    }
    more = {frozenset(layers.split()): (kind, by) for layers, (kind, by, _) in family.more.items()}
    return {**hand, **more}


@pytest.mark.parametrize("name", thin(FAMILIES))
def test_the_groups_are_the_authors_and_all_are_free(name: str) -> None:
    family = FAMILIES[name]
    program = program_of(family)
    for number in range(2):
        block = f"{family.block}.{number}."
        found = dict(
            inside(block, group)
            for group in program.get(find_scales).groups
            if module_path(group.linears[0]).startswith(block)
        )
        assert found == expected(family)
    prove(program)


def test_one_value_head_is_shared_by_all_query_heads() -> None:
    program = program_of(FAMILIES["bigcode"])
    tied = [group for group in program.get(find_scales).groups if group.kind == "tied"]
    assert [group.count for group in tied] == [8, 8]
    assert all(group.roots == tuple(range(8)) * 4 for group in tied)
