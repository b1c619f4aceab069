"""The models of `examples.integers`: random weights, with the outliers that trained ones have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from examples.variants import Tensors

ROWS = 16
"""Rows that outputs are compared on; as many others calibrate."""

OUTLIERS = 6 / 768
GAIN = 15.0


@dataclass(frozen=True)
class Case:
    """A model: `make(small)` gives it, at its full size or tiny, with 2 * ROWS rows of inputs.

    Engines are compared on the output named `output`; all of a row is one vector.
    """

    title: str
    make: Callable[[bool], tuple[nn.Module, Tensors]]
    output: str


_SMALL: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }
)


def add_outliers(model: nn.Module, seed: int = 0) -> None:
    """Multiply a few gains of every LayerNorm within a block by GAIN, in place.

    Trained models have a few channels with far larger activations than the rest; random weights
    have none, and they are what an integer range that channels share loses precision to. OUTLIERS
    of the channels are drawn, the same for every norm, as outliers keep to their channels. Blocks
    are the members of a ModuleList.
    """
    parts = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    inner = [module for part in parts for block in part for module in block.modules()]
    norms = [module for module in dict.fromkeys(inner) if isinstance(module, nn.LayerNorm)]
    width = norms[0].weight.numel()
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for norm in norms:
            norm.weight[order[: max(1, round(OUTLIERS * width))]] *= GAIN


def _vit(small: bool) -> tuple[nn.Module, Tensors]:
    size = 64 if small else 224
    sizes: dict[str, Any] = {**_SMALL, "image_size": size} if small else {}
    config = transformers.ViTConfig(**{"num_labels": 1000, **sizes})
    model: nn.Module = transformers.ViTForImageClassification(config)
    add_outliers(model)
    return model.eval(), {"pixel_values": torch.randn(2 * ROWS, 3, size, size)}


def _bert(small: bool) -> tuple[nn.Module, Tensors]:
    """Make a BERT, without added outliers.

    Its norms are on the residual stream, where a gain of 15 in every block would leave nothing
    but the outliers.
    """
    sizes: dict[str, Any] = {**_SMALL, "vocab_size": 512} if small else {}
    config = transformers.BertConfig(**sizes)
    model: nn.Module = transformers.BertModel(config)
    length = 16 if small else 128
    ids = torch.randint(1, config.vocab_size, (2 * ROWS, length))
    lengths = torch.randint(length * 3 // 4, length + 1, (2 * ROWS, 1))
    mask = (torch.arange(length) < lengths).to(torch.int64)
    return model.eval(), {"input_ids": ids * mask, "attention_mask": mask}


class Layers(nn.Module):
    """Square linear layers on a residual stream: what a decoder multiplies by for each token."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        """Map [B, width] to {"output": [B, width]}."""
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return {"output": hidden}


def _decode(small: bool) -> tuple[nn.Module, Tensors]:
    width = 128 if small else 4096
    return Layers(width, 1 if small else 4).eval(), {"hidden": torch.randn(2 * ROWS, width)}


CASES: Mapping[str, Case] = MappingProxyType(
    {
        "vit": Case("ViT-B/16, outlier channels, 197 tokens: logits", _vit, "logits"),
        "bert": Case("BERT-base, 128 tokens: last hidden state", _bert, "last_hidden_state"),
        "decode": Case("four layers of 4096 x 4096, a token a row", _decode, "output"),
    }
)
