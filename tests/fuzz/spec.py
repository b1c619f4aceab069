"""What a random transformer is: one flat row of choices, which prints as code that makes it."""

from dataclasses import dataclass, fields

CALLS = ("sdpa", "eager", "eager_before", "eager_query", "einsum", "bmm", "mha", "mha_weights")
QKV = ("separate", "chunk", "split", "unbind", "grouped")
PADDED = (
    *("bool", "bool_index", "bool_expand", "additive", "outer", "soft", "where", "expand_as"),
    *("written", "relative_padded", "causal_padded"),
)
"""Masks that hide padding: they need an input."""

MASKS = ("none", "causal", "tril", "triu_inf", "relative", "alibi", *PADDED)
ROTARY = ("rotary", "rotary_rest", "rotary_part", "rotary_pairs", "rotary_ids")
POSITIONS = ("none", "learned", "embedding", "sinus", "late", *ROTARY)
NORMS = ("layer", "rms", "rms_hand", "none")
ORDERS = ("pre", "post", "sandwich", "parallel")
MLPS = ("gelu", "relu", "swiglu", "gated", "conv1", "conv3", "conformer", "none")
ZEROS = ("mul", "fill", "put", "put_wide", "token", "each", "mul_each")
"""How values at padding are overwritten."""

WINDOWS, STAGES = ("none", "first", "others"), ("none", "conv", "patches", "pool")
TOWERS = ("none", "same", "other", "dual", "joined")
"""What a second input is: read by a decoder (of the same length), alone, or joined to the first."""

HEADS = (
    *("cls", "mean", "mean_patches", "masked_mean", "max", "min", "sum", "attention_pool"),
    *("tokens", "tokens_norm", "patches", "several", "hidden", "grid_conv", "last", "eos"),
    *("skip_mean", "skip_tokens", "softmax_pool", "transposed", "gram", "cls_mean"),
    *("masked_mean_wide", "masked_max", "eos_gather", "eos_max", "last_real", "grid_up"),
    *("grid_levels", "mean_std", "layers", "similar", "spans", "logits_last", "detect"),
)
NEEDS_MASK = ("masked_mean", "masked_mean_wide", "masked_max", "last_real")
NEEDS_IDS = ("eos", "eos_gather", "eos_max")
NEEDS_GRID = ("grid_conv", "grid_up", "grid_levels")
NEEDS_FRONT = ("mean_patches", "patches")
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
    zero: str = "none"
    mlp: str = "gelu"
    window: str = "none"
    stage: str = "none"
    tower: str = "none"
    axis: int = -1
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
    def own(self) -> int:
        """Tokens of the first input."""
        return self.grid[0] * self.grid[1] if self.source == "vision" else self.tokens

    @property
    def targets(self) -> int:
        """Tokens of the second input."""
        return self.own if self.tower == "same" else self.tokens + 1

    @property
    def count(self) -> int:
        """All tokens of the blocks: those at the front and at the back too."""
        joined = self.targets if self.tower == "joined" else 0
        return self.own + joined + self.front + self.back

    @property
    def takes_mask(self) -> bool:
        """Tell whether an input says which tokens are padding."""
        return self.mask in PADDED or self.zero != "none" or self.out in NEEDS_MASK
