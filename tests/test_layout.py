"""The shape of the tree: who imports whom, what is loaded when, and what ships."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import effopt
from tests import zoo

ROOT = Path(__file__).parent.parent
SHIPPED = ("effopt", "passes", "backends")
MAX_LINES, MAX_FUNCTION = 330, 55
"""Hard limits in lines; the aim is 300 a file and 40 a function."""

VENDORS = ("onnx", "onnxruntime", "onnxscript", "onnx_ir", "tensorrt", "openvino", "transformers")
HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "transformers", "numpy", "rich")


def sources(*folders: str) -> Iterator[Path]:
    """Yield each Python file once: the links inside of effopt are not followed."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT).parts
            if inside[:2] not in (("effopt", "passes"), ("effopt", "backends")):
                yield path


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> list[str]:
    """Return the modules that one import names, by statement or by call; [] for other nodes."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports(path: Path) -> list[str]:
    """Return every module that a file imports anywhere."""
    return [name for node in ast.walk(parsed(path)) for name in imported(node)]


def top_imports(path: Path) -> list[str]:
    """Return what a file imports when it is itself imported: not in functions or for types."""
    found, todo = list[str](), list[ast.AST](parsed(path).body)
    while todo:
        node = todo.pop()
        found += imported(node)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not typing_only:
            todo += ast.iter_child_nodes(node)
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def python(code: str, cwd: Path | None = None) -> str:
    """Run a program in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- who imports whom -------------------------------------------------------------------------


def test_the_compiler_imports_neither_passes_nor_backends_at_the_top() -> None:
    wrong = {
        str(path): name
        for path in sources("effopt")
        for name in top_imports(path)
        if within(name, "effopt.passes", "effopt.backends")
    }
    assert not wrong


def test_the_compiler_reads_only_tables_and_recipes_of_passes_and_backends() -> None:
    bridges = (
        *("effopt.passes", "effopt.passes.TABLE", "effopt.passes.PROBES", "effopt.passes.names"),
        *("effopt.passes.recipes.NORMAL_FORM", "effopt.passes.recipes.RECIPES"),
        *("effopt.passes.recipes.Recipe", "effopt.backends.TABLE", "effopt.backends.kernels.TABLE"),
    )
    found = {
        name
        for path in sources("effopt")
        for name in imports(path)
        if within(name, "effopt.passes", "effopt.backends")
    }
    assert found <= {*bridges}


@pytest.mark.parametrize(("own", "other"), [("passes", "backends"), ("backends", "passes")])
def test_passes_and_backends_do_not_import_each_other(own: str, other: str) -> None:
    found = {str(path): name for path in sources(own) for name in imports(path)}
    wrong = {path: name for path, name in found.items() if within(name, other, f"effopt.{other}")}
    assert not wrong
    bare = {path: name for path, name in found.items() if within(name, own)}
    assert not bare, "the bare name makes a second copy of the module"


def test_the_compiler_names_no_vendor_but_where_models_are_opened() -> None:
    found = [(path.name, name) for path in sources("effopt") for name in imports(path)]
    assert {one for one in found if within(one[1], *VENDORS)} == {("models.py", "transformers")}


def test_passes_name_no_vendor() -> None:
    found = [name for path in sources("passes") for name in imports(path)]
    assert not [name for name in found if within(name, *VENDORS)]


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_the_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "effopt" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (link / "__init__.py").samefile(ROOT / name / "__init__.py")


@pytest.mark.parametrize("name", ["passes", "backends", "backends.kernels"])
def test_the_bare_name_cannot_be_imported(name: str) -> None:
    code = f"import {name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "two names make two modules" in done.stderr


# --- what is loaded when ----------------------------------------------------------------------


def test_importing_effopt_loads_nothing_heavy() -> None:
    code = "import effopt, json, sys; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(python(code))
    assert not [name for name in loaded if within(name, *HEAVY)]


def test_help_loads_nothing_heavy() -> None:
    code = """
import json, sys
from effopt.__main__ import main
try:
    main(["--help"])
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stderr)
    assert "effopt convert" in done.stdout
    assert not [name for name in loaded if within(name, "torch", "transformers", "onnxruntime")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an engine of a tiny model while every socket is refused."""
    model, inputs = zoo.make("vit")
    folder = tmp_path_factory.mktemp("layout") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", _no_socket)
        patch.setattr(socket, "create_connection", _no_socket)
        patch.setattr(socket, "getaddrinfo", _no_socket)
        effopt.optimize(model, inputs, recipe="merge-tokens{r=2}").save(folder, measure=False)
        effopt.load(folder)(*[tensor.numpy() for tensor in inputs.values()])
    return folder


def _no_socket(*_: object, **__: object) -> None:
    raise AssertionError("effopt must not use the network")


def test_optimizing_and_running_use_no_network(engine: Path) -> None:
    assert (engine / "model.onnx").exists()


def test_running_an_engine_imports_no_torch(engine: Path) -> None:
    code = f"""
import json, sys
import numpy as np
import effopt
engine = effopt.load({str(engine)!r})
logits = engine(pixel_values=np.zeros((3, 3, 32, 32), np.float32))["logits"]
print(json.dumps([list(logits.shape), "torch" in sys.modules, "transformers" in sys.modules]))
"""
    assert json.loads(python(code)) == [[3, 5], False, False]


# --- what the code may contain ----------------------------------------------------------------


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in sources(*SHIPPED, "examples"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = (node.end_lineno or 0) - node.lineno + 1
                if count > MAX_FUNCTION:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {count} lines")
    assert not long


FORBIDDEN = {
    "pickle.load": r"\bpickle\.loads?\(",
    "pickle": r"^\s*(import (pickle|dill|joblib|marshal|shelve)\b|from (dill|joblib|marshal)\b)",
    "allow_pickle": r"allow_pickle\s*=\s*True",
    "eval": r"(?<![\w.])(eval|exec)\(",
    "shell": r"shell\s*=\s*True|os\.system\(",
    "extractall": r"\.extractall\(",
    "telemetry": r"\b(requests|urllib\.request|http\.client|urllib3|httpx|aiohttp)\b",
    "unsafe weights": r"weights_only\s*=\s*False|trust_remote_code\s*=\s*True",
}
"""What no shipped line may hold, each by a pattern over one line."""


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_shipped_line_holds_what_could_run_foreign_code(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    lines = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources(*SHIPPED, "examples")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not lines


def test_torch_load_always_says_weights_only() -> None:
    for path in sources(*SHIPPED, "examples"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert options.get("weights_only") == "True", f"{path}:{node.lineno}"


def test_every_public_name_resolves_and_is_documented() -> None:
    assert set(effopt.__all__) == set(dir(effopt))
    for name in effopt.__all__:
        assert (getattr(effopt, name).__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        effopt.optimise  # noqa: B018


def test_types_and_names_at_import_agree() -> None:
    """The names that type checkers see are those that can be got."""
    tree = parsed(ROOT / "effopt" / "__init__.py")
    block = next(node for node in tree.body if isinstance(node, ast.If))
    shown = {alias.asname for node in ast.walk(block) for alias in getattr(node, "names", [])}
    assert shown == set(effopt.__all__)


def test_the_versions_agree() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert version is not None
    assert f"[{version[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# --- what ships -------------------------------------------------------------------------------


def _shipped() -> set[str]:
    """Return what a wheel must hold: modules, sources of kernels and plugins, py.typed."""
    found = {"effopt/py.typed"}
    for path in sources(*SHIPPED):
        inside = path.relative_to(ROOT).as_posix()
        found.add(inside if inside.startswith("effopt/") else f"effopt/{inside}")
    others = [*ROOT.glob("backends/kernels/*.cu*"), *ROOT.glob("backends/plugin_source/*")]
    return found | {f"effopt/{path.relative_to(ROOT)}" for path in others}


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_no_other(tmp_path: Path) -> None:
    """Build from a clean copy, as a stale build folder would add files of its own."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        target = tmp_path / "copy" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(ROOT / name):
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
    built = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*built, "-w", str(tmp_path), str(tmp_path / "copy")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == _shipped()
