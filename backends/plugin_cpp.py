"""The C++ form of plugins: a source folder for full TensorRT, with PTX of one architecture.

The classes of TensorRT are written by hand over a table of descriptions, `plugin_source`; the table
is made here from the records of plugins, their expressions spelled in C++.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from effopt.backends.nvcc import Ptx, compile_ptx
from effopt.backends.onnx_plugins import plugins
from effopt.errors import UsageError
from effopt.plugin import FLOAT_TYPE, Plugin, Port
from effopt.sizes import cpp, names

SOURCE = Path(__file__).resolve().parent / "plugin_source"
TABLE = "effopt_table.cpp"

TYPES = {
    FLOAT_TYPE: "T",
    "float32": "DataType::kFLOAT",
    "float16": "DataType::kHALF",
    "bfloat16": "DataType::kBF16",
    "int8": "DataType::kINT8",
    "int32": "DataType::kINT32",
    "int64": "DataType::kINT64",
}
"""Types of tensors that a plugin of TensorRT may have: bool and uint8 are not among them."""

_FIELDS = {int: "PluginFieldType::kINT32", float: "PluginFieldType::kFLOAT32"}
_PIECE = 8000
"""Characters of a literal; some compilers take no more than 16,380."""

Compile = Callable[[str, str], Ptx]
"""Returns the PTX of a stem for an architecture."""


def write_source(
    folder: Path, wanted: Iterable[str], arch: str, compiled: Compile = compile_ptx
) -> list[str]:
    """Write the folder that a user compiles to a library of plugins; return the names of its files.

    `wanted` are names of plugins, `arch` the least architecture of the GPUs that run them, such as
    "sm_80". Raises UsageError for a name that is no plugin's, and what `compile_ptx` raises.
    """
    found = [_plugin(name) for name in sorted(set(wanted))]
    stems = {plugin.stem: compiled(plugin.stem, arch) for plugin in found}
    texts = {_included(stem): _literals(ptx.text) for stem, ptx in stems.items()}
    texts[TABLE] = _table(found, arch)
    folder.mkdir(parents=True, exist_ok=True)
    copied = [path.name for path in SOURCE.iterdir()]
    for name in copied:
        shutil.copyfile(SOURCE / name, folder / name)
    for name, text in texts.items():
        (folder / name).write_text(text, newline="\n")
    return sorted([*copied, *texts])


def _plugin(name: str) -> Plugin:
    if name not in plugins():
        offered = ", ".join(sorted(plugins()))
        raise UsageError(f"there is no plugin {name!r}", f"choose of {offered}")
    return plugins()[name]


def _included(stem: str) -> str:
    return f"{stem}.ptx.inc"


def _literals(text: str) -> str:
    pieces = [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]
    return "".join(f'R"ptx({piece})ptx",\n' for piece in pieces)


def _table(found: Sequence[Plugin], arch: str) -> str:
    stems = sorted({plugin.stem for plugin in found})
    return "\n".join([
        f"// Written by effopt: plugins with kernels for {arch} and later.",
        '#include "effopt_plugin.h"\n',
        "namespace effopt {",
        "namespace {\n",
        "using namespace nvinfer1;\n",
        *(_pieces(stem) for stem in stems),
        *(_functions(plugin) for plugin in found),
        "}  // namespace\n",
        "std::vector<Description> const& descriptions() {",
        "  static std::vector<Description> const all = {",
        *map(_row, found),
        "  };",
        "  return all;",
        "}\n",
        "}  // namespace effopt\n",
    ])  # fmt: skip


def _pieces(stem: str) -> str:
    return f'std::vector<char const*> const {stem}_ptx = {{\n#include "{_included(stem)}"\n}};\n'


def _functions(plugin: Plugin) -> str:
    """Write the two functions of a row, from what they read to the sizes or the launch."""
    sizes = [size for port in plugin.outputs for size in port.sizes]
    shapes = ", ".join(f"{{{_list(port.sizes)}}}" for port in plugin.outputs)
    numbers = [*plugin.grid, plugin.shared, *plugin.scalars]
    launch = f"{{{_list(plugin.grid)}}}, {plugin.block}, {cpp(plugin.shared)}"
    return "\n".join([
        f"std::vector<std::vector<Size>> {plugin.name}_results(",
        "    [[maybe_unused]] Known<Size> const& known) {",
        *_read(plugin, sizes),
        f"  return {{{shapes}}};",
        "}\n",
        f"Launch {plugin.name}_launch([[maybe_unused]] Known<int64_t> const& known) {{",
        *_read(plugin, numbers),
        f"  return {{{launch}, {{{_list(plugin.scalars)}}}}};",
        "}\n",
    ])  # fmt: skip


def _list(expressions: Iterable[str]) -> str:
    return ", ".join(map(cpp, expressions))


def _read(plugin: Plugin, expressions: Iterable[str]) -> list[str]:
    """Declare what expressions read; a size is that of the first input which has the name."""
    places = {
        size: f"auto const {size} = known.sizes[{at}][{axis}]"
        for at, port in reversed(list(enumerate(plugin.inputs)))
        for axis, size in reversed(list(enumerate(port.sizes)))
    }
    for at, (name, kind) in enumerate(plugin.attributes.items()):
        held = "Real" if kind is float else "auto"
        places[name] = f"{held} const {name}{{known.attributes[{at}]}}"
    read = sorted(frozenset[str]().union(*map(names, expressions)))
    return [f"  {places[name]};" for name in read]


def _row(plugin: Plugin) -> str:
    inputs = [
        f'{{"{port.name}", {_type(port)}, {{{", ".join(_quoted(size) for size in port.sizes)}}}}}'
        for port in plugin.inputs
    ]
    attributes = [f'{{"{name}", {_FIELDS[kind]}}}' for name, kind in plugin.attributes.items()]
    parts = [
        f'"{plugin.name}"',
        f'"{plugin.stem}"',
        f"{{{', '.join(inputs)}}}",
        f"{{{', '.join(map(_type, plugin.outputs))}}}",
        f"{{{', '.join(attributes)}}}",
        f"{plugin.name}_results",
        f"{plugin.name}_launch",
        f"{plugin.stem}_ptx",
    ]
    return "      {" + ",\n       ".join(parts) + "},"


def _quoted(text: str) -> str:
    return f'"{text}"'


def _type(port: Port) -> str:
    if port.dtype not in TYPES:
        raise ValueError(f"{port.name}: a plugin of TensorRT has no tensors of {port.dtype}")
    return TYPES[port.dtype]
