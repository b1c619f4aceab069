"""Draw example inputs for a Hugging Face model from its config."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effopt.errors import UsageError
from effopt.inputs import FORMS

ROWS = 2
_TOKENS = 128
_WAVE = 16_000
_FRAMES = 100
Drawn = dict[str, Tensor]


def example_inputs_of(model: nn.Module, seed: int) -> Drawn:
    """Draw inputs for a Hugging Face model: two rows, the second of a text padded.

    What `main_input_name` says comes first, then the inputs of other kinds that `forward` takes
    beside it: an image beside a text, a target beside a source. Raises UsageError where the
    config does not tell sizes.
    """
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main not in KINDS:
        raise UsageError(
            f"example inputs are needed: {type(model).__name__} has no config to infer them from",
            FORMS,
        )
    draw = _Draw(config, frozenset(_parameters(model)), torch.Generator().manual_seed(seed))
    drawn = KINDS[main](draw)
    for name, also in BESIDE.items():
        if name in draw.takes and name not in drawn and also(draw):
            drawn |= KINDS[name](draw)
    return drawn


def _parameters(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


@dataclass(frozen=True)
class _Draw:
    """A config, the names that `forward` takes, and the source of random numbers."""

    config: Any
    takes: frozenset[str]
    random: torch.Generator

    def setting(self, part: str, *names: str, default: Any = None) -> Any:
        """Find a setting under one of its names: in the config, or in its part of that name."""
        for config in _parts(self.config, part):
            for name in names:
                if (found := getattr(config, name, None)) is not None:
                    return found
        return default

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(ROWS, *sizes, generator=self.random)


_PARTS = {
    "text": ("text_config", "decoder", "text_encoder"),
    "image": ("vision_config", "image_config", "backbone_config", "encoder"),
    "sound": ("audio_config", "encoder"),
}


def _parts(config: Any, part: str) -> Iterator[Any]:
    """Yield the part of a nested config that is about one kind of input, then the config."""
    yield from (found for name in _PARTS[part] if (found := getattr(config, name, None)))
    yield config


# --- texts


def _tokens(draw: _Draw) -> Drawn:
    """Draw token ids; the last quarter of the second row is padding, as in batches of texts."""
    pad = int(draw.setting("text", "pad_token_id", default=0))
    room = int(draw.setting("text", "max_position_embeddings", "max_seq_len", default=0))
    room = room if room > 0 else _TOKENS + pad + 1  # none, or -1: positions have no end
    # Models that number positions from the pad id on (RoBERTa) take that many tokens fewer.
    length = min(_TOKENS, room - pad - 1 if 0 <= pad < room - 1 else room)
    mask = torch.ones(ROWS, length, dtype=torch.long)
    mask[1, length - length // 4 :] = 0
    ids = _words(draw, length)
    ends = draw.setting("text", "eos_token_id")
    if isinstance(ends, int):
        ids[torch.arange(ROWS), mask.sum(1) - 1] = ends
    beside = {
        "attention_mask": mask,
        "bbox": torch.tensor([10, 20, 50, 40]).expand(ROWS, length, 4).contiguous(),
    }
    if draw.setting("text", "type_vocab_size"):  # GPT-2, which has none, would take them for words
        beside["token_type_ids"] = torch.zeros_like(ids)
    masked = {"input_ids": ids.masked_fill(mask == 0, max(pad, 0))}
    return masked | {name: given for name, given in beside.items() if name in draw.takes}


def _words(draw: _Draw, length: int) -> Tensor:
    """Draw ids of ordinary tokens: none that the config gives a role to."""
    vocabulary = draw.setting("text", "vocab_size")
    if vocabulary is None:
        raise UsageError("the config names no vocab_size", FORMS)
    ordinary = torch.ones(int(vocabulary))
    roles = [getattr(part, name, None) for part in _parts(draw.config, "text") for name in _ROLES]
    ordinary[[role for role in roles if isinstance(role, int) and 0 <= role < vocabulary]] = 0
    spread = ordinary if ordinary.any() else torch.ones_like(ordinary)
    allowed = spread.nonzero().flatten()
    return allowed[torch.randint(len(allowed), (ROWS, length), generator=draw.random)]


_ROLES = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id"),
    *("decoder_start_token_id", "mask_token_id", "unk_token_id"),
)


def _targets(draw: _Draw) -> Drawn:
    """Draw the beginning of a target text, of another length than a source."""
    room = draw.setting("text", "max_target_positions", "max_position_embeddings", default=_TOKENS)
    return {"decoder_input_ids": _words(draw, min(_TOKENS // 4, int(room) // 2))}


# --- images and videos


def _images(draw: _Draw) -> Drawn:
    frames = draw.setting("image", "num_frames")
    return {"pixel_values": _pixels(draw, [] if frames is None else [int(frames)])}


def _videos(draw: _Draw) -> Drawn:
    frames = draw.setting("image", "num_frames", "frames_per_clip")
    if frames is None:
        raise UsageError("the config names no num_frames", FORMS)
    return {"pixel_values_videos": _pixels(draw, [int(frames)])}


_SIZES = ("image_size", "crop_size", "input_size")


def _pixels(draw: _Draw, frames: list[int]) -> Tensor:
    size = draw.setting("image", *_SIZES)
    if size is None:
        raise UsageError("the config names no image_size", FORMS)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = draw.setting("image", "num_channels", "in_channels", "in_chans", default=3)
    return draw.normal(*frames, int(channels), height, width)


# --- sounds


def _sounds(draw: _Draw) -> Drawn:
    """Draw a second of a wave, or the spectrogram that the config gives the size of."""
    bins, frames = draw.setting("sound", "num_mel_bins"), draw.setting("sound", "max_length")
    if bins is not None and frames is not None and "patch_size" in dir(draw.config):
        return {"input_values": draw.normal(int(frames), int(bins))}
    return {"input_values": draw.normal(_WAVE)}


def _features(draw: _Draw) -> Drawn:
    """Draw a spectrogram: [bins, frames] where positions bound it, else [frames, features]."""
    bins = draw.setting("sound", "num_mel_bins")
    bound = draw.setting("sound", "max_source_positions")
    size = draw.setting("sound", "feature_projection_input_dim", "input_feat_per_channel")
    if size is not None:
        channels = draw.setting("sound", "input_channels", default=1)
        features = draw.normal(_FRAMES, int(size) * int(channels))
        mask = torch.ones(ROWS, _FRAMES, dtype=torch.long)
        mask[1, _FRAMES - _FRAMES // 4 :] = 0
        masked = {"attention_mask": mask} if "attention_mask" in draw.takes else {}
        return {"input_features": features, **masked}
    if bins is None or bound is None:
        raise UsageError("the config does not tell the size of input_features", FORMS)
    return {"input_features": draw.normal(int(bins), 2 * int(bound))}


# --- which inputs go together


def _has_images(draw: _Draw) -> bool:
    """Images go beside a text where they have an encoder; a prompt's places for them are unknown.

    How many places of a prompt one image takes is known to the model's processor alone.
    """
    placed = draw.setting("text", "image_token_id", "image_token_index")
    if placed is not None:
        raise UsageError(
            "the prompt holds places for images, which only the model's processor can write",
            "pass what the processor returns as example inputs",
        )
    return draw.setting("image", *_SIZES) is not None


def _is_encoder_decoder(draw: _Draw) -> bool:
    return bool(draw.setting("text", "is_encoder_decoder", default=False))


def _always(draw: _Draw) -> bool:
    return True


KINDS: dict[str, Callable[[_Draw], Drawn]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _targets,
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "input_values": _sounds,
    "input_features": _features,
}
"""How each kind of input is drawn, with what belongs to it (a text's mask)."""

BESIDE: dict[str, Callable[[_Draw], bool]] = {
    "input_ids": _always,
    "pixel_values": _has_images,
    "decoder_input_ids": _is_encoder_decoder,
}
"""Inputs that go beside the main one where `forward` takes them, and when."""
