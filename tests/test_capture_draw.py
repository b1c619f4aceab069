"""Inputs drawn from a config, caches that are left out, and lengths of inputs without ids."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from effopt.capture import capture
from effopt.draw import example_inputs_of
from effopt.errors import CaptureError, UsageError
from tests.architectures import ARCHITECTURES

DRAWN: dict[str, dict[str, list[int]]] = {
    "vit": {"pixel_values": [2, 3, 32, 32]},
    "videomae": {"pixel_values": [2, 4, 3, 32, 32]},
    "vjepa2": {"pixel_values_videos": [2, 4, 3, 32, 32]},
    "bert": {"input_ids": [2, 64], "attention_mask": [2, 64], "token_type_ids": [2, 64]},
    "gpt2": {"input_ids": [2, 64], "attention_mask": [2, 64]},
    "lilt": {
        **{"input_ids": [2, 64], "attention_mask": [2, 64], "bbox": [2, 64, 4]},
        "token_type_ids": [2, 64],
    },
    "bart": {"input_ids": [2, 64], "attention_mask": [2, 64], "decoder_input_ids": [2, 32]},
    "clip": {"input_ids": [2, 64], "attention_mask": [2, 64], "pixel_values": [2, 3, 32, 32]},
    "wav2vec2": {"input_values": [2, 16000]},
    "audio-spectrogram-transformer": {"input_values": [2, 32, 16]},
    "whisper-encoder": {"input_features": [2, 8, 32]},
}


@pytest.mark.parametrize("name", DRAWN)
def test_inputs_are_drawn_for_each_kind_of_model(name: str) -> None:
    model, _ = ARCHITECTURES[name].make()
    drawn, again = example_inputs_of(model, 3), example_inputs_of(model, 3)
    assert {key: list(given.shape) for key, given in drawn.items()} == DRAWN[name]
    assert all(torch.equal(given, again[key]) for key, given in drawn.items())
    with torch.no_grad():
        model(**drawn)


def test_drawn_words_have_no_role_in_the_config() -> None:
    """A high pad id, as GPT-2's, once left no word to draw; eos ends each text, and only there."""
    model: Any = nn.Linear(1, 1)
    model.forward = lambda input_ids, attention_mask: input_ids
    model.main_input_name = "input_ids"
    model.config = SimpleNamespace(vocab_size=9, pad_token_id=8, eos_token_id=7)
    drawn = example_inputs_of(model, 0)
    ids, real = drawn["input_ids"], drawn["attention_mask"] == 1
    assert ids.shape == (2, 128)
    assert (ids[~real] == 8).all()
    assert (ids[real] < 8).all()
    assert (ids == 7).sum(1).tolist() == [1, 1]


def test_a_prompt_with_places_for_images_must_be_given() -> None:
    model, _ = ARCHITECTURES["llava"].make()
    with pytest.raises(UsageError, match="only the model's processor can write"):
        example_inputs_of(model, 0)


def decoder() -> Any:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **{"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16},
            **{"num_hidden_layers": 1, "num_attention_heads": 2},
        )
    ).eval()


def test_a_decoder_is_captured_without_its_cache_and_keeps_its_config() -> None:
    model = decoder()
    program = capture(model, {"input_ids": torch.randint(0, 99, (2, 6))})
    assert [item.name for item in program.signature.outputs] == ["logits"]
    assert model.config.use_cache is True


def test_a_cache_that_is_asked_for_is_refused_with_its_remedy() -> None:
    ids = torch.randint(0, 99, (2, 6))
    with pytest.raises(CaptureError, match="DynamicCache") as caught:
        capture(decoder(), {"input_ids": ids, "use_cache": True})
    assert "use_cache=False" in caught.value.remedy


class Mean(nn.Module):
    """Averages values under a mask."""

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        return (values * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


def test_dynamic_length_of_values_and_a_floating_mask() -> None:
    given = {"values": torch.randn(2, 6, 4), "mask": torch.ones(2, 6)}
    program = capture(Mean(), given, dynamic=("batch", "length"))
    shapes = {item.name: item.shape for item in program.signature.inputs}
    assert shapes == {"values": ("batch", "length", 4), "mask": ("batch", "length")}


def test_features_beside_ids_do_not_take_their_length() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 4)

        def forward(self, ids: Tensor, places: Tensor, image: Tensor) -> Tensor:
            return (self.words(ids) + self.words(places)).mean(1) + image.mean(1)

    ids, places = torch.randint(0, 9, (2, 6)), torch.arange(6)[None]
    program = capture(Beside(), (ids, places, torch.randn(2, 6, 4)), dynamic=("batch", "length"))
    shapes = [item.shape for item in program.signature.inputs]
    assert shapes == [("batch", "length"), (1, "length"), ("batch", 6, 4)]
