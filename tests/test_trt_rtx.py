"""Every recipe is built by TensorRT-RTX, without a GPU: a compile check of what GPU targets write.

One plan serves sm_80 and sm_89, with a batch from 1 to 8; 8-bit floats are for sm_89 alone. Nothing
here runs a plan.
"""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as tf
from onnx import TensorProto, helper, numpy_helper

from effopt.backend import backend
from effopt.backends.onnx import MODEL, opened
from effopt.backends.onnx_check import check_file
from effopt.backends.onnx_plugins import plugin_nodes
from effopt.backends.readiness import MAX_TOPK
from effopt.backends.trt_build import Outcome, Request, ask
from effopt.backends.trt_modules import installed
from effopt.backends.trt_profiles import known_sizes, profiles, ranges
from effopt.calibration import read_calibration
from effopt.capture import capture
from effopt.errors import MissingError, PreconditionError, UsageError
from effopt.passes.recipes import RECIPES
from effopt.pipeline import Pipeline
from effopt.program import Program
from effopt.recipe import steps_of
from effopt.target import target
from tests.thin import thin

pytestmark = pytest.mark.skipif(
    installed("trt-rtx") is None,
    reason="TensorRT-RTX is not installed: pip install --no-deps tensorrt-rtx-cu13-libs "
    "tensorrt-rtx-cu13-bindings",
)

ARCHS = ("sm_80", "sm_89")
FP8 = "quantize{scheme=fp8}"
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
         "intermediate_size": 256}  # fmt: skip
"""Widths are multiples of 128, so that blocks of 4-bit weights fit."""


def vit() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = tf.ViTConfig(**SIZES, image_size=64, patch_size=8, num_labels=8)
    return tf.ViTForImageClassification(config), {"pixel_values": torch.randn(4, 3, 64, 64)}


def bert() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = tf.BertConfig(**SIZES, vocab_size=128, max_position_embeddings=64, num_labels=8)
    ids, mask = torch.randint(3, 128, (4, 48)), torch.ones(4, 48).long()
    mask[1, 40:] = 0
    return tf.BertForSequenceClassification(config), {"input_ids": ids, "attention_mask": mask}


@cache
def normal(name: str) -> Program:
    """Capture a model, with data to calibrate on, and bring it to its normal form, once."""
    torch.manual_seed(0)
    model, inputs = {"vit": vit, "bert": bert}[name]()
    program = capture(model.eval(), inputs)
    program.calibration = read_calibration([inputs], program)
    made, _ = Pipeline(steps_of("exact")).run(program)
    made.calibration = program.calibration
    return made


def written(name: str, recipe: str, machine: str, folder: Path) -> Program:
    """Write the file of a recipe for a target; the passes that came before are not run again."""
    program = normal(name)
    program.target = target(machine)
    made, _ = Pipeline(steps_of(recipe)[len(steps_of("exact")) :]).run(program)
    artifact = backend("onnx").build(made, target(machine), folder)
    (folder / "ports").write_text(json.dumps(dict(artifact.ports)))
    return made


def module() -> str:
    found = installed("trt-rtx")
    assert found is not None
    return found


def asked(program: Program, folder: Path, archs: tuple[str, ...], **options: Any) -> Outcome:
    chosen = ranges(known_sizes(program), {"batch": (1, 4, 8)})
    shapes = profiles(program.signature, chosen, MODEL)
    plan = folder / "model.plan"
    return ask(Request(module(), folder / MODEL, plan, archs, shapes, options), 240)


def built(program: Program, folder: Path, archs: tuple[str, ...], **options: Any) -> Outcome:
    found = asked(program, folder, archs, **options)
    assert found.support.ok, found.support.reason
    assert found.bytes == (folder / "model.plan").stat().st_size
    return found


HOLDS = {
    "exact": TensorProto.FLOAT,
    "small": TensorProto.INT4,
    "awq": TensorProto.INT4,
    "gptq": TensorProto.INT4,
    "smoothquant": TensorProto.INT8,
    "quantize{scheme=fp16}": TensorProto.FLOAT16,
    FP8: TensorProto.FLOAT8E4M3FN,
}
"""What the weights of a file are, so that no build proves less than it seems to."""


TOKENS = ("balanced", "fast", "tome", "evit")
"""Recipes whose files have plugins in place of the kernels that choose and move tokens."""

ROUNDED = {"smoothquant": 0.02, "quantize{scheme=fp16}": 2e-3}
"""Largest difference to eager torch, of the largest value; 1e-5 for others (measured: 9e-7).

An input between two codes falls to either side: 0.011 was measured; in fp16 0.0008."""


def agrees(program: Program, folder: Path, recipe: str) -> None:
    """Hold the file in onnxruntime to the graph in eager torch; no TensorRT is asked."""
    made = json.loads((folder / "ports").read_text())
    signature = program.signature.with_ports(made)
    samples = [np.ascontiguousarray(tensor.numpy()) for tensor in program.samples]
    # As written: onnxruntime would put 4-bit products on integers of its own.
    found = opened(folder, signature, {}, check_only=True).run(samples)
    for got, want in zip(found, program.run(program.samples), strict=True):
        most = ROUNDED.get(recipe, 1e-5) * float(want.abs().max())
        assert np.abs(got.astype(np.float32) - want.float().numpy()).max() <= most


def in_turn(recipes: Iterable[str]) -> list[Any]:
    """Each recipe with one of the models, in turn; all pairs in the slow set."""
    slow = pytest.mark.slow
    return [
        (recipe, name) if (row + column) % 2 == 0 else pytest.param(recipe, name, marks=slow)
        for row, recipe in enumerate(recipes)
        for column, name in enumerate(("vit", "bert"))
    ]


@pytest.mark.parametrize(("recipe", "name"), in_turn([*RECIPES, "quantize{scheme=fp16}"]))
def test_every_recipe_builds_for_ampere_and_ada(name: str, recipe: str, tmp_path: Path) -> None:
    """In the plugin-free form, which onnxruntime runs as eager torch does."""
    program = written(name, recipe, "a100{plugins=off}", tmp_path)
    assert HOLDS.get(recipe, TensorProto.FLOAT) in check_file(tmp_path / MODEL)
    assert plugin_nodes([tmp_path / MODEL]) == {}
    agrees(program, tmp_path, recipe)
    found = built(program, tmp_path, ARCHS)
    assert found.layers > 100
    assert found.plugins == 0


@pytest.mark.parametrize(("recipe", "name"), in_turn(TOKENS))
def test_files_with_plugins_build_by_their_functions(
    name: str, recipe: str, tmp_path: Path
) -> None:
    """The library has no plugins of ours, so it parses and builds what stands for them."""
    program = written(name, recipe, "a100", tmp_path)
    kernels = {"MatchMerge"} if recipe != "evit" else {"PruneTokens", "AttentionRow"}
    assert kernels <= set(plugin_nodes([tmp_path / MODEL]))
    agrees(program, tmp_path, recipe)
    assert built(program, tmp_path, ARCHS).plugins == 0


@pytest.mark.parametrize("name", thin(["vit", "bert"]))
@pytest.mark.parametrize("recipe", thin([r for r in RECIPES if r not in TOKENS], 3))
def test_a_file_without_tokens_to_move_has_no_plugins_for_it(
    name: str, recipe: str, tmp_path: Path
) -> None:
    program = written(name, recipe, "a100", tmp_path)
    assert set(plugin_nodes([tmp_path / MODEL])) <= {"Int4Linear"}
    agrees(program, tmp_path, recipe)


@pytest.mark.parametrize("name", thin(["vit", "bert"]))
def test_8_bit_floats_build_for_ada_alone(name: str, tmp_path: Path) -> None:
    program = written(name, FP8, "l4{plugins=off}", tmp_path)
    assert HOLDS[FP8] in check_file(tmp_path / MODEL)
    built(program, tmp_path, ("sm_89",))
    found = asked(program, tmp_path, ("sm_80",))
    assert "fp8" in found.support.reason.lower()
    assert not (tmp_path / "model.plan").exists()


# --- what the builder says ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return written("vit", "exact", "a100{plugins=off}", folder), folder


def test_options_that_the_library_has_and_those_that_it_refuses(
    plain: tuple[Program, Path], tmp_path: Path
) -> None:
    program, folder = plain
    assert built(program, folder, ("sm_80",), weight_streaming=True, workspace=256, level=2).bytes
    with pytest.raises(PreconditionError, match="CUDA") as caught:
        asked(program, folder, ("sm_80",), refit=True).require(MODEL)
    assert caught.value.remedy == "build on the machine that has the GPU"
    for name in ("hardware_compatible", "timing_cache"):
        value = str(tmp_path / "cache") if name == "timing_cache" else True
        with pytest.raises(UsageError, match=f"takes no option '{name}': "):
            asked(program, folder, ("sm_80",), **{name: value}).require(MODEL)
    assert not (tmp_path / "cache").exists()


def test_an_architecture_that_it_does_not_build_for(plain: tuple[Program, Path]) -> None:
    program, folder = plain
    with pytest.raises(MissingError, match="does not build for sm_90") as caught:
        asked(program, folder, ("sm_90",)).require(MODEL)
    assert caught.value.remedy == "it builds for sm_75 sm_80 sm_86 sm_89 sm_120 sm_121"


def test_a_refused_node_is_named(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 8]) for name in "xy"]
    nodes = [
        helper.make_node("Abs", ["x"], ["a"], name="first"),
        helper.make_node("MergeAll", ["a"], ["y"], name="second", domain="elsewhere"),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / MODEL)
    with pytest.raises(PreconditionError, match="lugin") as caught:
        ask(Request(module(), tmp_path / MODEL), 60).require(MODEL)
    assert caught.value.node == "second (MergeAll)"


def attention(folder: Path, names: str) -> None:
    """Write an Attention operator in float32, which no kernel of the library computes."""
    shape = [2, 4, 16, 32]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]
    inputs = [names[0], names[len(names) // 3], names[-2]]  # "q", "k", "v", or one for all
    graph = helper.make_graph(
        [helper.make_node("Attention", inputs, [names[-1]])], "g", values[:-1], values[-1:]
    )
    opsets = [helper.make_opsetid("", 23)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / MODEL)


def test_what_only_the_builder_refuses_is_a_reason(tmp_path: Path) -> None:
    attention(tmp_path, "qkvy")
    assert ask(Request(module(), tmp_path / MODEL), 60).support.ok
    found = ask(Request(module(), tmp_path / MODEL, tmp_path / "p.plan", ("sm_80",)), 60)
    assert "not supported by a dedicated kernel" in found.reason


def test_a_node_that_only_the_builder_refuses_is_named(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, MAX_TOPK + 100])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, MAX_TOPK + 1])
    node = helper.make_node("TopK", ["x", "k"], ["y", "i"], name="keeps")
    k = numpy_helper.from_array(np.array([MAX_TOPK + 1]), "k")
    graph = helper.make_graph([node], "g", [x], [y], [k])
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / MODEL)
    assert ask(Request(module(), tmp_path / MODEL), 60).support.ok
    found = ask(Request(module(), tmp_path / MODEL, tmp_path / "p.plan", ("sm_80",)), 60)
    assert (found.node, found.kind) == ("keeps", "model")
    assert "3840" in found.reason
    assert not (tmp_path / "p.plan").exists()


def test_a_crash_of_the_builder_is_a_reason(tmp_path: Path) -> None:
    """Version 1.7 dies of a segmentation fault where query, key and value are one tensor."""
    attention(tmp_path, "qy")
    found = ask(Request(module(), tmp_path / MODEL, tmp_path / "p.plan", ("sm_80",)), 60)
    assert not found.support.ok
    assert found.kind in ("process", "model")  # a later version may refuse it in words
