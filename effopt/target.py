"""The machines that effopt optimises for, as rows of a table.

Figures of GPUs are dense peaks; None or an absent dtype means that no source was checked, and an
estimate made with a figure says that it is one. Sources: the A100 data sheet as quoted at
glennklockwood.com (80 GB SXM card; the 40 GB card has 1555 GB/s), public comparison pages of
H100/H200/B200 (SXM), A10, L4/T4 and RTX 4090 (fp16 and fp8 with fp32 accumulation). Where a page
gives the figure with 2:4 sparsity, half of it stands here; where pages differ, the smaller one
does. float32 is that of the plain cores: our engines do not round such products to TF32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from effopt.errors import UsageError, unknown
from effopt.spec import parse


@dataclass(frozen=True)
class Target:
    """One kind of machine.

    `arch` is "cpu", "portable" or a CUDA architecture such as "sm_80". `bandwidth` is in GB/s,
    `peak` maps a dtype to Tera-operations/s (2 per multiply-accumulate). `dtypes` are those of
    activations that the machine computes in, `schemes` the quantizations that it runs. `plugins`
    says whether files for a GPU hold nodes of our plugins; each has a function in standard
    operators beside it, for runtimes without the plugin.
    """

    name: str
    backend: str
    arch: str
    dtypes: tuple[str, ...]
    schemes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    bandwidth: float | None = None
    peak: tuple[tuple[str, float], ...] = ()
    plugins: bool = True

    @property
    def tensorrt(self) -> str:
        """The versions of TensorRT that serve the architecture."""
        return TENSORRT.get(self.arch, "")

    @property
    def asymmetric(self) -> bool:
        """Tell whether the machine runs 4-bit weights with zero points as fast as without."""
        return "asymmetric" in self.features

    @property
    def kind(self) -> str:
        """What files for it share: "cpu", "portable" or "gpu"."""
        return "gpu" if self.gpu else self.arch

    @property
    def gpu(self) -> bool:
        """Tell whether the target is a CUDA device."""
        return self.arch.startswith("sm_")


_FP16, _BF16 = ("float32", "float16"), ("float32", "float16", "bfloat16")
_INT8, _INT4 = ("int8",), ("int8", "int4-weights")
_FP8 = (*_INT4, "fp8")

_HOPPER = (
    ("float32", 67.0), ("float16", 989.0), ("bfloat16", 989.0), ("int8", 1979.0),
    ("fp8", 1979.0),
)  # fmt: skip

_ROWS = (
    Target(
        "cpu", "ort", "cpu", ("float32",), ("int8-dynamic", "int8", "int4-weights"),
        ("asymmetric",),
    ),
    Target("onnx", "onnx", "portable", ("float32",), ("int8-dynamic", "int8", "int4-weights")),
    Target(
        "t4", "trt", "sm_75", _FP16, _INT8, (), 320.0,
        (("float32", 8.1), ("float16", 65.0), ("int8", 130.0)),
    ),
    Target(
        "a100", "trt", "sm_80", _BF16, _INT4, ("2:4",), 2039.0,
        (("float32", 19.5), ("float16", 312.0), ("bfloat16", 312.0), ("int8", 624.0)),
    ),
    Target(
        "a10", "trt", "sm_86", _BF16, _INT4, ("2:4",), 600.0,
        (("float32", 31.2), ("float16", 125.0), ("bfloat16", 125.0), ("int8", 250.0)),
    ),
    Target(
        "l4", "trt", "sm_89", _BF16, _FP8, ("2:4",), 300.0,
        (
            ("float32", 30.3), ("float16", 121.0), ("bfloat16", 121.0), ("int8", 242.0),
            ("fp8", 242.0),
        ),
    ),
    Target(
        "rtx4090", "trt", "sm_89", _BF16, _FP8, ("2:4",), 1008.0,
        (
            ("float32", 82.6), ("float16", 165.0), ("bfloat16", 165.0), ("int8", 661.0),
            ("fp8", 330.0),
        ),
    ),
    Target(
        "h100", "trt", "sm_90", _BF16, _FP8, ("2:4",), 3350.0,
        _HOPPER,
    ),
    Target(
        "h200", "trt", "sm_90", _BF16, _FP8, ("2:4",), 4800.0,
        _HOPPER,
    ),
    Target(
        "b200", "trt", "sm_100", _BF16, (*_FP8, "nvfp4"), ("2:4",), 8000.0,
        (
            ("float32", 75.0), ("float16", 2250.0), ("bfloat16", 2250.0), ("fp8", 4500.0),
            ("nvfp4", 9000.0),
        ),
    ),
    Target("orin", "trt", "sm_87", _BF16, _INT4, ("2:4",)),
)  # fmt: skip

TENSORRT: Mapping[str, str] = MappingProxyType({
    **dict.fromkeys(("sm_75", "sm_80", "sm_86", "sm_89", "sm_90"), "10.x, 11.x"),
    "sm_87": "10.x (JetPack 6), 11.4.1 on (JetPack 7.2)",
    "sm_100": "10.8 on, 11.x",
})  # fmt: skip
"""By architecture, as NVIDIA's support matrices and its guide from 10.x to 11.x say."""

TARGETS: Mapping[str, Target] = MappingProxyType({row.name: row for row in _ROWS})
"""All targets by name; a GPU row writes ONNX files anywhere, and says what is pending."""


def target(text: str) -> Target:
    """Return a target by its name, which may have options: `a100` or `a100{plugins=off}`.

    Raises UsageError with the nearest name where there is none, and for unknown options.
    """
    items = parse(text)
    if len(items) > 1 or items[0].name not in TARGETS:
        raise unknown("target", text, TARGETS)
    found, options = TARGETS[items[0].name], items[0].options
    switch = options.get("plugins", "on")
    if switch not in _SWITCH or set(options) - ({"plugins"} if found.gpu else set()):
        reason = f"the target {text} has options that it does not know"
        raise UsageError(reason, "GPU targets take plugins=on or plugins=off, others no options")
    if _SWITCH[switch]:
        return found
    return replace(found, name=f"{found.name}{{plugins=off}}", plugins=False)


_SWITCH: Mapping[object, bool] = MappingProxyType(
    {"on": True, True: True, "off": False, False: False}
)
