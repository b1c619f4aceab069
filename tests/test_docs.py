"""The documents: their code runs, their tables are complete, their links lead somewhere."""

import importlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effopt
import effopt.save
from effopt import axis_table, effects
from effopt.axes import find_axes, same_size, show
from effopt.backends import TABLE as BACKENDS
from effopt.capture import capture
from effopt.cli import COMMANDS
from effopt.pipeline import Pipeline, Step, pass_class
from effopt.plugin import running
from effopt.program import Program, shape
from effopt.recipe import steps_of
from effopt.sites import TokenAxis, find_tokens
from effopt.target import TARGETS
from tests import zoo
from tests.plugin_runs import in_onnxruntime, in_reference, on_host

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
aten = torch.ops.aten


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def example(name: str) -> dict[str, Any]:
    """Run one worked example of CONTRIBUTING.md and return its names."""
    found = text_of("CONTRIBUTING.md").split(f"<!-- example: {name} -->")[1]
    names: dict[str, Any] = {"__name__": f"example_{name}"}
    exec(compile(blocks(found)[0], f"CONTRIBUTING.md ({name})", "exec"), names)
    return names


# --- README -----------------------------------------------------------------------------------


def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`my-vit` is a tiny ViT with random weights, its images are as small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(effopt.save, "BUDGET", 0.2)
    model, inputs = zoo.make("vit")
    model.save_pretrained(tmp_path / "my-vit")  # type: ignore[operator]
    images = inputs["pixel_values"]
    names: dict[str, Any] = {"images": images.numpy(), "example_inputs": images}
    first, second = blocks(text_of("README.md"))
    exec(compile(first, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 5)
    assert (tmp_path / "out" / "report.html").exists()
    exec(compile(second, "README.md", "exec"), names)
    assert names["outputs"]["logits"].shape == (2, 5)
    assert effopt.load(names["folder"]).manifest["recipe"].endswith("merge-tokens{r=8}")


THERE_IS = {
    "recipes": tuple(effopt.recipes()),
    "passes": effopt.passes.names(),
    "targets": tuple(TARGETS),
    "commands": tuple(COMMANDS),
}


@pytest.mark.parametrize("names", THERE_IS.values(), ids=THERE_IS.keys())
def test_the_readme_names_everything_there_is(names: tuple[str, ...]) -> None:
    text = text_of("README.md")
    for name in names:
        assert re.search(rf"(`|effopt |\| ){re.escape(name)}\b", text), name


def test_the_readme_names_every_option_of_every_pass() -> None:
    rows = [line for line in text_of("README.md").splitlines() if line.startswith("| `")]
    for name in effopt.passes.names():
        row = next(line for line in rows if line.startswith(f"| `{name}` |"))
        for option in fields(pass_class(name)):
            assert f"`{option.name}`" in row, (name, option.name)


def test_the_readme_shows_a_run_of_the_demo() -> None:
    table = text_of("README.md").split("<!-- demo")[1].split("<!-- /demo")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 4
    assert all(re.search(r"\d", cell) for row in rows for cell in row[1:-1])


# --- CONTRIBUTING -----------------------------------------------------------------------------


class Relus(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.relu(x)) - 1


def test_the_example_of_a_pass_is_true() -> None:
    made = example("pass")["DropDoubleRelu"]()
    program = capture(Relus(), torch.randn(2, 3))
    assert effopt.passes.names()  # the example must not be there already
    assert made.name not in effopt.passes.names()
    after, (record,) = Pipeline([Step(made)]).run(program)
    assert record.changed
    assert record.notes == ("1 dropped",)
    assert after.text().count("relu(") == 1
    assert torch.equal(after.run(program.samples)[0], program.run(program.samples)[0])
    _, (again,) = Pipeline([Step(made)]).run(after)
    assert (again.changed, again.notes) == (False, ("no pair",))


def test_the_example_of_a_kernel_is_true() -> None:
    found = example("kernel")["KERNEL"]
    for sample in found.samples():
        torch.testing.assert_close(
            found.lowering(*sample), found.op(*sample), rtol=0, atol=found.tolerance
        )
        torch.library.opcheck(found.op, sample)


def test_the_example_of_a_plugin_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files: a function's body is read from its source, and CUDA is compiled for the host."""
    kernel = example("kernel")["KERNEL"]
    part = text_of("CONTRIBUTING.md").split("<!-- example: plugin -->")[1]
    (tmp_path / "token_norm_plugin.py").write_text(blocks(part)[0])
    source = tmp_path / "token_norm.cu"
    source.write_text(re.findall(r"```cuda\n(.*?)```", part, re.DOTALL)[0])
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("token_norm_plugin")
    for run in (in_onnxruntime, in_reference, partial(on_host, source=source)):
        for sample in kernel.samples():
            with running(run):
                found = module.adapt(*sample)
            torch.testing.assert_close(found, kernel.op(*sample), rtol=0, atol=1e-6)


class Diagonal(nn.Module):
    """One block whose MLP reads a diagonal: of a table of each token, or of tokens by channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (own(x).unsqueeze(1) for own in (self.q, self.k, self.v))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        if self.dim == 1:
            return x.diagonal(0, 1, 2)
        table = self.up(x).unflatten(-1, (4, 4))
        return (x + self.down(table.diagonal(0, -2, -1))).mean(dim=1)


@pytest.fixture
def ruled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the rule and the effect of the example into the tables, as its text says."""
    rule = ("diagonal", example("rule")["diagonal"])
    monkeypatch.setitem(axis_table.RULES, aten.diagonal.default, rule)
    text = re.sub(r"\s+", " ", text_of("CONTRIBUTING.md"))
    row = re.search(r'`"diagonal": (_along\(.*?\))`\.', text)
    assert row is not None
    names = {"_along": effects._along, "dim_arg": effects.dim_arg}
    monkeypatch.setitem(effects.EFFECTS, "diagonal", eval(row[1], names))


def normal(model: nn.Module) -> Program:
    return Pipeline(steps_of("exact")).run(capture(model, torch.randn(2, 6, 8)))[0]


def axis_of(program: Program) -> TokenAxis:
    (axis,) = program.get(find_tokens)
    return axis


def test_an_operator_without_a_rule_blocks() -> None:
    refusal = axis_of(normal(Diagonal(-1))).sites[0].refusal
    assert "no axis rule for aten.diagonal.default" in str(refusal)


@pytest.mark.usefixtures("ruled")
def test_the_example_of_a_rule_is_true() -> None:
    program = normal(Diagonal(-1))
    (node,) = (node for node in program.nodes() if node.target is aten.diagonal.default)
    dims = program.get(find_axes).of(node)
    assert same_size(shape(node)[2], 4)
    assert show(dims[1]) == show(axis_of(program).tokens.dim)
    assert axis_of(program).effects[node].kind.value == "map"
    assert axis_of(program).sites[0].refusal is None
    assert "tokens are paired" in str(axis_of(normal(Diagonal(1))).sites[0].refusal)


def test_the_example_of_a_target_is_true() -> None:
    row = example("target")["row"]
    assert row.name not in TARGETS
    assert row.gpu
    assert row.backend in BACKENDS


# --- all documents ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not link.startswith("https://"):
            assert (path.parent / link).exists(), link


def _named_files(text: str) -> Iterator[str]:
    yield from re.findall(r"`((?:effopt|passes|backends|tests|examples|docs)/[\w/.]+\.\w+)`", text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(path: Path) -> None:
    made_by_the_reader = {"passes/drop_double_relu.py", "backends/kernels/token_norm.py"}
    for name in _named_files(path.read_text(encoding="utf-8")):
        assert name in made_by_the_reader or (ROOT / name).exists(), name


def test_the_picture_is_well_formed_and_holds_no_script() -> None:
    root = ET.parse(ROOT / "docs" / "architecture.svg").getroot()
    tags = {element.tag.split("}")[1] for element in root.iter()}
    assert root.get("viewBox")
    assert {"title", "desc"} <= tags
    assert not tags & {"script", "foreignObject", "image", "use"}
