"""Small models with random weights, from configs; gains and offsets are never 1 and 0."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

tf.logging.set_verbosity_error()
Made = tuple[nn.Module, dict[str, Tensor]]
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
_VISION = {**_SIZES, "image_size": 32, "patch_size": 8}
_TEXT = {**_SIZES, "vocab_size": 100, "max_position_embeddings": 66}


def _images(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def texts(rows: int = 2, length: int = 16, real: tuple[int, ...] = (16, 11)) -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (rows, length))
    mask = torch.zeros_like(ids)
    for row, count in enumerate(real):
        mask[row, :count] = 1
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def vit() -> Made:
    return tf.ViTForImageClassification(tf.ViTConfig(**_VISION, num_labels=5)), _images()


def deit() -> Made:
    config = tf.DeiTConfig(**_VISION, num_labels=5)
    return tf.DeiTForImageClassificationWithTeacher(config), _images()


def dinov2() -> Made:
    config = tf.Dinov2Config(**{**_VISION, "mlp_ratio": 2}, num_labels=5)
    return tf.Dinov2ForImageClassification(config), _images()


def clip_vision() -> Made:
    return tf.CLIPVisionModelWithProjection(
        tf.CLIPVisionConfig(**_VISION, projection_dim=16)
    ), _images()


def bert() -> Made:
    return tf.BertForSequenceClassification(tf.BertConfig(**_TEXT)), texts()


def bert_tokens() -> Made:
    return tf.BertForTokenClassification(tf.BertConfig(**_TEXT, num_labels=5)), texts()


def roberta() -> Made:
    return tf.RobertaForSequenceClassification(tf.RobertaConfig(**_TEXT)), texts()


class Encoder(nn.Module):
    """A plain nn.TransformerEncoder, with or without a padding mask."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


def encoder() -> Made:
    return Encoder(norm_first=True), {"x": torch.randn(2, 12, 32)}


def encoder_padded() -> Made:
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1, 8:] = True
    return Encoder(norm_first=False), {"x": torch.randn(2, 12, 32), "padding": padding}


MODELS: dict[str, Callable[[], Made]] = {
    "vit": vit,
    "deit": deit,
    "dinov2": dinov2,
    "clip_vision": clip_vision,
    "bert": bert,
    "bert_tokens": bert_tokens,
    "roberta": roberta,
    "encoder": encoder,
    "encoder_padded": encoder_padded,
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model whose every parameter is random, biases and norm gains included."""
    torch.manual_seed(seed)
    model, inputs = MODELS[name]()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            gain = 1.0 if "norm" in path.lower() and path.endswith("weight") else 0.0
            weight.normal_(gain, 0.2 if weight.ndim == 1 else 0.15)
    return model.eval(), inputs
