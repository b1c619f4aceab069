"""The wide zoo: small models with random weights, one row for each architecture."""

from tests.architectures import (
    audio,
    decoders,
    multimodal,
    plain,
    pyramids,
    text,
    video,
    vision,
)
from tests.architectures.base import Architecture, Made

MODULES = (vision, pyramids, text, audio, video, multimodal, decoders, plain)
ARCHITECTURES: dict[str, Architecture] = {
    row.name: row for module in MODULES for row in module.ARCHITECTURES
}

__all__ = ["ARCHITECTURES", "Architecture", "Made"]
