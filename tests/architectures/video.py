"""Video models: tubes of frames as tokens, and attention divided over space and time."""

from collections.abc import Callable

import torch

from tests.architectures.base import VISION, Given, Settings, hugging_face

_FRAMES: Settings = {**VISION, "num_frames": 4}


def _frames() -> Given:
    return {"pixel_values": torch.randn(2, 4, 3, 32, 32)}


def _frames_videos() -> Given:
    return {"pixel_values_videos": torch.randn(2, 4, 3, 32, 32)}


_ROWS: tuple[tuple[str, str, Settings, Callable[[], Given]], ...] = (
    ("videomae", "VideoMAEForVideoClassification", _FRAMES, _frames),
    (
        "vivit",
        "VivitForVideoClassification",
        {**_FRAMES, "tubelet_size": [2, 8, 8]},
        _frames,
    ),
    ("timesformer", "TimesformerForVideoClassification", _FRAMES, _frames),
    (
        "vjepa2",
        "VJEPA2ForVideoClassification",
        {
            **VISION,
            "hidden_size": 48,
            "crop_size": 32,
            "frames_per_clip": 4,
            "mlp_ratio": 2.0,
            "num_pooler_layers": 1,
            "pred_hidden_size": 48,
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 1,
            "num_labels": 5,
        },
        _frames_videos,
    ),
)

ARCHITECTURES = tuple(
    hugging_face(name, "video", model, settings, inputs) for name, model, settings, inputs in _ROWS
)
