"""Image models that keep one sequence of patches: plain vision transformers and their heads."""

from collections.abc import Callable

import torch

from tests.architectures.base import VISION, Given, Settings, hugging_face, images

_LABELS = {"num_labels": 5}


def _noise() -> Given:
    """ViT-MAE shuffles patches by noise: given, it is the same in each run."""
    return {**images(), "noise": torch.rand(2, 16)}


def _patches() -> Given:
    """SigLIP 2 takes patches, of which the second image has fewer, and their grids."""
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 12:] = 0
    shapes = torch.tensor([[4, 4], [3, 4]])
    pixels = torch.randn(2, 16, 8 * 8 * 3)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


_ROWS: tuple[tuple[str, str, Settings, Callable[[], Given]], ...] = (
    ("vit", "ViTForImageClassification", {**VISION, **_LABELS}, images),
    ("vit-eager", "ViTForImageClassification", {**VISION, "attn_implementation": "eager"}, images),
    ("deit", "DeiTForImageClassificationWithTeacher", {**VISION, **_LABELS}, images),
    ("dinov2", "Dinov2ForImageClassification", {**VISION, "mlp_ratio": 2, **_LABELS}, images),
    (
        "dinov2-with-registers",
        "Dinov2WithRegistersForImageClassification",
        {**VISION, "mlp_ratio": 2, "num_register_tokens": 2, **_LABELS},
        images,
    ),
    ("dinov3-vit", "DINOv3ViTModel", {**VISION, "num_register_tokens": 2}, images),
    (
        "beit",
        "BeitForImageClassification",
        {**VISION, "use_relative_position_bias": True, **_LABELS},
        images,
    ),
    (
        "data2vec-vision",
        "Data2VecVisionForImageClassification",
        {**VISION, "use_shared_relative_position_bias": True, **_LABELS},
        images,
    ),
    ("vit-mae", "ViTMAEModel", {**VISION, "mask_ratio": 0.0}, _noise),
    ("vit-msn", "ViTMSNForImageClassification", {**VISION, **_LABELS}, images),
    ("ijepa", "IJepaForImageClassification", {**VISION, **_LABELS}, images),
    ("clip-vision", "CLIPVisionModelWithProjection", {**VISION, "projection_dim": 16}, images),
    ("siglip-vision", "SiglipVisionModel", VISION, images),
    ("siglip2-vision", "Siglip2VisionModel", {**VISION, "num_patches": 16}, _patches),
    ("aimv2", "Aimv2VisionModel", VISION, images),
    ("mlcd", "MLCDVisionModel", VISION, images),
    ("pixio", "PixioModel", {**VISION, "mlp_ratio": 2, "n_cls_tokens": 2}, images),
    (
        "radio",
        "RadioModel",
        {**VISION, "mlp_ratio": 2.0, "patch_dim": 192, "max_img_size": 32, "num_registers": 2},
        images,
    ),
    (
        "yolos",
        "YolosForObjectDetection",
        {**VISION, "image_size": [32, 32], "num_detection_tokens": 5},
        images,
    ),
    ("vitdet", "VitDetModel", {**VISION, "mlp_ratio": 2, "pretrain_image_size": 32}, images),
    (
        "dpt",
        "DPTForDepthEstimation",
        {
            **VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
        },
        images,
    ),
    (
        "depth-anything",
        "DepthAnythingForDepthEstimation",
        {
            "backbone_config": {
                "model_type": "dinov2",
                **VISION,
                "num_hidden_layers": 4,
                "mlp_ratio": 2,
                "out_indices": [1, 2, 3, 4],
                "apply_layernorm": True,
                "reshape_hidden_states": False,
            },
            "patch_size": 8,
            "reassemble_hidden_size": 32,
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
            "head_hidden_size": 8,
        },
        images,
    ),
    (
        "zoedepth",
        "ZoeDepthForDepthEstimation",
        {
            "backbone_config": {
                "model_type": "beit",
                **VISION,
                "num_hidden_layers": 4,
                "out_indices": [1, 2, 3, 4],
                "reshape_hidden_states": False,
            },
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
            "bottleneck_features": 16,
            "num_relative_features": 8,
            "bin_embedding_dim": 16,
            "num_attractors": [4, 2, 2, 1],
            "bin_configurations": [{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}],
        },
        images,
    ),
    (
        "vitpose",
        "VitPoseForPoseEstimation",
        {
            "backbone_config": {
                "model_type": "vitpose_backbone",
                **VISION,
                "image_size": [32, 32],
                "patch_size": [8, 8],
                "mlp_ratio": 2,
            },
            "num_labels": 5,
        },
        images,
    ),
    (
        "eomt",
        "EomtForUniversalSegmentation",
        {**VISION, "num_blocks": 1, "num_queries": 4, "num_register_tokens": 2},
        images,
    ),
    (
        "mgp-str",
        "MgpstrForSceneTextRecognition",
        {
            **VISION,
            "image_size": [32, 32],
            "mlp_ratio": 2,
            "num_bpe_labels": 20,
            "num_wordpiece_labels": 20,
            "max_token_length": 4,
        },
        images,
    ),
    ("pixtral-vision", "PixtralVisionModel", {**VISION, "head_dim": 16}, images),
    ("chinese-clip-vision", "ChineseCLIPVisionModel", VISION, images),
    ("altclip-vision", "AltCLIPVisionModel", VISION, images),
    ("metaclip2-vision", "MetaClip2VisionModel", VISION, images),
    ("janus-vision", "JanusVisionModel", {**VISION, "projection_dim": 16}, images),
    ("internvl-vision", "InternVLVisionModel", {**VISION, "use_qk_norm": True}, images),
    (
        "groupvit-vision",
        "GroupViTVisionModel",
        {
            **VISION,
            "depths": [1, 1, 1],
            "num_group_tokens": [8, 4, 0],
            "num_output_groups": [8, 4, 4],
        },
        images,
    ),
)

ARCHITECTURES = tuple(
    hugging_face(name, "vision", model, settings, inputs) for name, model, settings, inputs in _ROWS
)
