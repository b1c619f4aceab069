"""Models of images and texts: two towers, fused streams, and images as a prompt's tokens."""

from collections.abc import Callable

import torch

from tests.architectures.base import (
    TEXT,
    VISION,
    Given,
    Settings,
    hugging_face,
    images,
    images_texts,
    texts,
)

_IMAGE_TOKEN = 99
_TOWERS: Settings = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}
_DECODER: Settings = {
    **TEXT,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}
_BLIP: Settings = {
    "text_config": {
        **TEXT,
        "encoder_hidden_size": 32,
        "sep_token_id": 2,
    },
    "vision_config": VISION,
    "projection_dim": 16,
    "image_text_hidden_size": 16,
}


def _prompted(count: int) -> Callable[[], Given]:
    """Draw a prompt in which `count` places after the first are those of the image."""

    def inputs() -> Given:
        ids = torch.randint(3, _IMAGE_TOKEN, (2, 8 + count))
        ids[:, 1 : 1 + count] = _IMAGE_TOKEN
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images()}

    return inputs


def _prefixed() -> Given:
    """PaliGemma marks what follows the prompt; without marks sdpa and eager differ in 5.23."""
    given = _prompted(16)()
    marks = torch.zeros_like(given["input_ids"])
    marks[:, -4:] = 1
    return {**given, "token_type_ids": marks}


def _page() -> Given:
    corner = torch.randint(0, 40, (2, 16, 2))
    return {**images_texts(), "bbox": torch.cat([corner, corner + 9], -1)}


def _clip_of_frames() -> Given:
    """X-CLIP compares two videos of four frames with two texts."""
    return {**texts(), "pixel_values": torch.randn(2, 4, 3, 32, 32)}


def _regions() -> Given:
    """Draw regions in place of an image: features of what a detector found."""
    return {**texts(), "visual_embeds": torch.randn(2, 5, 16)}


def _boxed_regions() -> Given:
    return {**texts(), "visual_feats": torch.randn(2, 5, 16), "visual_pos": torch.rand(2, 5, 4)}


_ROWS: tuple[tuple[str, str, Settings, Callable[[], Given]], ...] = (
    ("clip", "CLIPModel", _TOWERS, images_texts),
    (
        "siglip",
        "SiglipModel",
        {"text_config": {**TEXT, "projection_size": 32}, "vision_config": VISION},
        images_texts,
    ),
    ("chinese-clip", "ChineseCLIPModel", _TOWERS, images_texts),
    (
        "altclip",
        "AltCLIPModel",
        {**_TOWERS, "text_config": {**TEXT, "project_dim": 32}},
        images_texts,
    ),
    ("metaclip2", "MetaClip2Model", _TOWERS, images_texts),
    (
        "groupvit",
        "GroupViTModel",
        {
            **_TOWERS,
            "projection_intermediate_dim": 32,
            "vision_config": {
                **VISION,
                "depths": [1, 1, 1],
                "num_group_tokens": [8, 4, 0],
                "num_output_groups": [8, 4, 4],
            },
        },
        images_texts,
    ),
    (
        "clipseg",
        "CLIPSegForImageSegmentation",
        {
            **_TOWERS,
            "projection_dim": 32,
            "extract_layers": [0, 1, 2],
            "reduce_dim": 16,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
        images_texts,
    ),
    ("owlvit", "OwlViTForObjectDetection", {**_TOWERS, "projection_dim": 32}, images_texts),
    ("owlv2", "Owlv2ForObjectDetection", {**_TOWERS, "projection_dim": 32}, images_texts),
    (
        "x-clip",
        "XCLIPModel",
        {
            **_TOWERS,
            "prompt_layers": 1,
            "prompt_num_attention_heads": 2,
            "vision_config": {
                **VISION,
                "num_frames": 4,
                "mit_hidden_size": 16,
                "mit_intermediate_size": 32,
                "mit_num_attention_heads": 2,
            },
        },
        _clip_of_frames,
    ),
    ("blip-itm", "BlipForImageTextRetrieval", _BLIP, images_texts),
    ("blip", "BlipModel", _BLIP, images_texts),
    (
        "blip-2",
        "Blip2ForConditionalGeneration",
        {
            "vision_config": VISION,
            "qformer_config": {**TEXT, "encoder_hidden_size": 32},
            "text_config": {
                **TEXT,
                "model_type": "opt",
                "ffn_dim": 64,
                "word_embed_proj_dim": 32,
                "use_cache": False,
            },
            "num_query_tokens": 4,
            "image_token_index": _IMAGE_TOKEN,
        },
        _prompted(4),
    ),
    ("vilt", "ViltForQuestionAnswering", {**VISION, **TEXT, "max_image_length": 16}, images_texts),
    (
        "flava",
        "FlavaModel",
        {
            "image_config": VISION,
            "text_config": TEXT,
            "multimodal_config": {**VISION},
            "hidden_size": 32,
            "projection_dim": 16,
        },
        images_texts,
    ),
    (
        "layoutlmv3",
        "LayoutLMv3ForTokenClassification",
        {
            **TEXT,
            "hidden_size": 36,
            "coordinate_size": 6,
            "shape_size": 6,
            "max_2d_position_embeddings": 64,
            "rel_pos_bins": 8,
            "rel_2d_pos_bins": 8,
            "input_size": 32,
            "patch_size": 8,
        },
        _page,
    ),
    (
        "llava",
        "LlavaForConditionalGeneration",
        {
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "text_config": _DECODER,
            "image_token_index": _IMAGE_TOKEN,
            "image_seq_length": 16,
        },
        _prompted(16),
    ),
    (
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        {
            "vision_config": {
                **VISION,
                "model_type": "siglip_vision_model",
                "projection_dim": 32,
                "vision_use_head": False,
            },
            "text_config": {**_DECODER, "model_type": "gemma", "head_dim": 8},
            "image_token_index": _IMAGE_TOKEN,
            "projection_dim": 32,
        },
        _prefixed,
    ),
    ("git", "GitForCausalLM", {**TEXT, "vision_config": VISION, "use_cache": False}, images_texts),
    (
        "bridgetower",
        "BridgeTowerForImageAndTextRetrieval",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "text_config": TEXT,
            "vision_config": {**VISION, "hidden_size": 64},
        },
        images_texts,
    ),
    (
        "visual-bert",
        "VisualBertForQuestionAnswering",
        {**TEXT, "visual_embedding_dim": 16},
        _regions,
    ),
    (
        "lxmert",
        "LxmertModel",
        {
            **{key: value for key, value in TEXT.items() if key != "num_hidden_layers"},
            "l_layers": 2,
            "x_layers": 1,
            "r_layers": 1,
            "visual_feat_dim": 16,
        },
        _boxed_regions,
    ),
    (
        "perceiver",
        "PerceiverForSequenceClassification",
        {
            "num_latents": 8,
            "d_latents": 32,
            "d_model": 32,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "vocab_size": 100,
            "max_position_embeddings": 32,
        },
        lambda: {"inputs": texts()["input_ids"], "attention_mask": texts()["attention_mask"]},
    ),
)

ARCHITECTURES = tuple(
    hugging_face(name, "multimodal", model, settings, inputs)
    for name, model, settings, inputs in _ROWS
)
