"""What a row of the zoo is, and the parts that rows share: sizes, inputs, random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as tf
from torch import Tensor, nn

tf.logging.set_verbosity_error()
Family = Literal["vision", "text", "audio", "video", "multimodal", "decoder", "plain"]
Given = dict[str, Tensor]
Made = tuple[nn.Module, Given]
Settings = dict[str, Any]

HIDDEN: Settings = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
VISION: Settings = {**HIDDEN, "image_size": 32, "patch_size": 8}
IDS: Settings = {"vocab_size": 100, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
TEXT: Settings = {**HIDDEN, **IDS, "max_position_embeddings": 66}


@dataclass(frozen=True)
class Architecture:
    """One model of the zoo; `make` builds it, always with the same weights and inputs."""

    name: str
    family: Family
    make: Callable[[], Made]


def hugging_face(
    name: str, family: Family, model: str, settings: Settings, inputs: Callable[[], Given]
) -> Architecture:
    """Name a transformers class; it is imported, and its config filled, when the model is made."""

    def build() -> nn.Module:
        made = getattr(tf, model)
        return made(made.config_class(**settings))

    return architecture(name, family, build, inputs)


def architecture(
    name: str, family: Family, build: Callable[[], nn.Module], inputs: Callable[[], Given]
) -> Architecture:
    """Draw weights and inputs from one seed."""

    def make() -> Made:
        torch.manual_seed(0)
        model = build()
        scramble(model)
        return model.eval(), inputs()

    return Architecture(name, family, make)


def scramble(model: nn.Module) -> None:
    """Draw every parameter and running figure: gains are not 1, offsets not 0."""
    gains = {
        id(weight)
        for path, module in model.named_modules()
        for key, weight in module.named_parameters(recurse=False)
        if key == "weight" and "norm" in f"{path}.{type(module).__name__}".lower()
    }
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0 if id(weight) in gains else 0.0, _spread(weight))
        for path, figure in model.named_buffers():
            if path.endswith("running_mean"):
                figure.normal_(0.0, 0.2)
            if path.endswith("running_var"):
                figure.uniform_(0.5, 1.5)


def _spread(weight: Tensor) -> float:
    """Return a deviation with which a signal outlives a deep stack of narrow convolutions."""
    return 0.2 if weight.ndim < 2 else max(0.15, weight[0].numel() ** -0.5)


def images(size: int = 32, name: str = "pixel_values") -> Given:
    return {name: torch.randn(2, 3, size, size)}


def texts(length: int = 16, real: tuple[int, ...] = (16, 11)) -> Given:
    """Draw token ids; the second row is padded."""
    ids = torch.randint(3, 100, (len(real), length))
    mask = torch.zeros_like(ids)
    for row, count in enumerate(real):
        mask[row, :count] = 1
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def pairs() -> Given:
    """Draw a source text, padded, and a target text."""
    return {**texts(), "decoder_input_ids": torch.randint(3, 100, (2, 8))}


def images_texts() -> Given:
    return {**texts(), **images()}
