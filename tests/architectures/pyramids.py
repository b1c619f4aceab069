"""Image models with windows, stages or a convolutional trunk: their token count changes."""

from collections.abc import Callable

import torch

from tests.architectures.base import VISION, Given, Settings, hugging_face, images

_LABELS = {"num_labels": 5}
_STAGES = {"depths": [1, 2], "image_size": 32}
_PYRAMID: Settings = {
    "num_encoder_blocks": 2,
    "depths": [1, 2],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
_DETECTION: Settings = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 6,
}


def _resnet() -> Settings:
    return {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
        "out_features": ["stage2"],
    }


def _big() -> Given:
    return images(64)


def _detected() -> Given:
    """DETR takes a mask of the pixels that are image and not padding."""
    mask = torch.ones(2, 64, 64, dtype=torch.long)
    mask[1, :, 48:] = 0
    return {**images(64), "pixel_mask": mask}


_ROWS: tuple[tuple[str, str, Settings, Callable[[], Given]], ...] = (
    (
        "sam-vision",
        "SamVisionModel",
        {
            **VISION,
            "image_size": 64,
            "mlp_dim": 64,
            "output_channels": 16,
            "window_size": 4,
            "global_attn_indexes": [2],
        },
        _big,
    ),
    (
        "swin",
        "SwinForImageClassification",
        {**_STAGES, "patch_size": 2, "embed_dim": 16, "num_heads": [2, 2], "window_size": 4},
        images,
    ),
    (
        "swinv2",
        "Swinv2ForImageClassification",
        {
            **_STAGES,
            "patch_size": 2,
            "embed_dim": 16,
            "num_heads": [2, 2],
            "window_size": 4,
            "pretrained_window_sizes": [0, 0],
        },
        images,
    ),
    (
        "hiera",
        "HieraForImageClassification",
        {
            "image_size": [64, 64],
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [1, 2],
            "num_query_pool": 1,
            "masked_unit_attention": [True, False],
            **_LABELS,
        },
        _big,
    ),
    (
        "segformer",
        "SegformerForSemanticSegmentation",
        {**_PYRAMID, "decoder_hidden_size": 16, **_LABELS},
        images,
    ),
    (
        "pvt",
        "PvtForImageClassification",
        {
            **_PYRAMID,
            "image_size": 32,
            "patch_sizes": [4, 2],
            "sequence_reduction_ratios": [2, 1],
        },
        images,
    ),
    ("pvt-v2", "PvtV2ForImageClassification", {**_PYRAMID, "image_size": 32}, images),
    (
        "cvt",
        "CvtForImageClassification",
        {
            "patch_sizes": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [2, 1],
            "embed_dim": [16, 32],
            "num_heads": [1, 2],
            "depth": [1, 2],
            "mlp_ratio": [2.0, 2.0],
            "attention_drop_rate": [0.0, 0.0],
            "drop_rate": [0.0, 0.0],
            "drop_path_rate": [0.0, 0.0],
            "qkv_bias": [True, True],
            "cls_token": [False, True],
            "qkv_projection_method": ["dw_bn", "dw_bn"],
            "kernel_qkv": [3, 3],
            "padding_kv": [1, 1],
            "stride_kv": [2, 2],
            "padding_q": [1, 1],
            "stride_q": [1, 1],
        },
        images,
    ),
    (
        "levit",
        "LevitForImageClassificationWithTeacher",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "down_ops": [["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 3, 2, 2, 2]],
        },
        _big,
    ),
    (
        "mobilevit",
        "MobileViTForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32],
            "num_attention_heads": 2,
        },
        _big,
    ),
    (
        "poolformer",
        "PoolFormerForImageClassification",
        {
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
            "num_encoder_blocks": 2,
            **_LABELS,
        },
        images,
    ),
    ("detr", "DetrForObjectDetection", {**_DETECTION, "backbone_config": _resnet()}, _detected),
    (
        "conditional-detr",
        "ConditionalDetrForObjectDetection",
        {**_DETECTION, "backbone_config": _resnet()},
        _detected,
    ),
)

ARCHITECTURES = tuple(
    hugging_face(name, "vision", model, settings, inputs) for name, model, settings, inputs in _ROWS
)
