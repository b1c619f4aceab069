"""What a random transformer is: one flat row of choices, which prints as code that makes it."""

from dataclasses import dataclass, fields

CALLS = ("sdpa", "eager", "eager_before", "eager_query", "bmm", "mha")
QKV = ("separate", "chunk", "split", "unbind", "grouped")
MASKS = (
    *("none", "bool", "bool_index", "bool_expand", "additive", "causal", "tril", "triu_inf"),
    *("relative", "alibi"),
)
POSITIONS = ("none", "learned", "embedding", "sinus", "rotary", "late")
NORMS = ("layer", "rms", "rms_hand", "none")
ORDERS = ("pre", "post", "sandwich", "parallel")
MLPS = ("gelu", "relu", "swiglu", "gated", "conv1", "conv3", "none")
HEADS = (
    *("cls", "mean", "mean_patches", "masked_mean", "max", "min", "sum", "attention_pool"),
    *("tokens", "tokens_norm", "patches", "several", "hidden", "grid_conv", "last", "eos"),
    *("skip_mean", "skip_tokens", "softmax_pool", "transposed", "gram", "cls_mean"),
)
HOSTILE = (
    *("roll", "flip", "cumsum", "softmax", "conv", "add_mean", "gate_first", "max", "argmax"),
    *("strided", "sort", "concat", "window", "squeeze_excite", "topk", "batch_mean", "scatter"),
    *("shift", "mask_constant", "linear_tokens", "first_difference", "std", "select_add"),
    *("matmul_tokens", "batch_flip", "norm_tokens", "index_tokens", "add_max", "cat_drop"),
    *("add_early", "mul_early", "table", "repeat_mean", "einsum", "noncontiguous"),
)
"""Operators that may stand between blocks."""


@dataclass(frozen=True)
class Spec:
    """One model. Fields that do not go together are brought together by `settled`."""

    seed: int = 0
    source: str = "float"
    tokens: int = 9
    grid: tuple[int, int] = (3, 3)
    depth: int = 2
    heads: int = 2
    head: int = 4
    front: int = 0
    back: int = 0
    front_by: str = "expand"
    position: str = "none"
    types: bool = False
    norm: str = "layer"
    order: str = "pre"
    gain: bool = False
    call: str = "sdpa"
    qkv: str = "separate"
    mask: str = "none"
    mlp: str = "gelu"
    hostile: tuple[tuple[int, str], ...] = ()
    out: str = "tokens"
    tokens_first: bool = False
    final_norm: bool = True
    free_length: bool = False

    def __repr__(self) -> str:
        plain = {f.name: f.default for f in fields(self)}
        shown = [f"{k}={v!r}" for k, v in vars(self).items() if v != plain[k]]
        return f"Spec({', '.join(shown)})"

    @property
    def width(self) -> int:
        return self.heads * self.head

    @property
    def count(self) -> int:
        """All tokens, those at the front and at the back too."""
        own = self.grid[0] * self.grid[1] if self.source == "vision" else self.tokens
        return own + self.front + self.back
