"""Speech and sound models: waves through convolutions, or spectrograms cut into patches."""

from collections.abc import Callable

import torch

from tests.architectures.base import HIDDEN, Given, Settings, hugging_face

_CONVOLUTIONS: Settings = {
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}
_SPEECH: Settings = {
    **HIDDEN,
    **_CONVOLUTIONS,
    "vocab_size": 20,
    "pad_token_id": 0,
    "classifier_proj_size": 16,
    "num_codevectors_per_group": 4,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
}
_SPECTRUM: Settings = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 100,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "use_cache": False,
}
_WHISPER: Settings = {
    **_SPECTRUM,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "begin_suppress_tokens": None,
}


def _waves(length: int = 430) -> Given:
    """Draw two sounds of about 20 frames each, of the same length."""
    return {"input_values": torch.randn(2, length)}


def _padded_waves() -> Given:
    mask = torch.ones(2, 430, dtype=torch.long)
    mask[1, 300:] = 0
    return {**_waves(), "attention_mask": mask}


def _spectrogram() -> Given:
    return {"input_features": torch.randn(2, 8, 32)}


def _spectrogram_text() -> Given:
    return {**_spectrogram(), "decoder_input_ids": torch.randint(3, 100, (2, 6))}


def _frames() -> Given:
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 18:] = 0
    return {"input_features": torch.randn(2, 24, 16), "attention_mask": mask}


def _frames_text() -> Given:
    return {**_frames(), "decoder_input_ids": torch.randint(3, 100, (2, 6))}


def _bands() -> Given:
    return {"input_values": torch.randn(2, 32, 16)}


def _waves_text() -> Given:
    return {**_waves(2000), "decoder_input_ids": torch.randint(3, 100, (2, 6))}


_ROWS: tuple[tuple[str, str, Settings, Callable[[], Given]], ...] = (
    ("wav2vec2", "Wav2Vec2ForCTC", _SPEECH, _waves),
    (
        "wav2vec2-padded",
        "Wav2Vec2ForSequenceClassification",
        {**_SPEECH, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        _padded_waves,
    ),
    ("hubert", "HubertForCTC", _SPEECH, _waves),
    ("wavlm", "WavLMForSequenceClassification", {**_SPEECH, "num_buckets": 16}, _waves),
    ("unispeech", "UniSpeechForCTC", _SPEECH, _waves),
    ("unispeech-sat", "UniSpeechSatForSequenceClassification", _SPEECH, _waves),
    ("data2vec-audio", "Data2VecAudioForCTC", {**_SPEECH, "conv_pos_kernel_size": 3}, _waves),
    ("sew", "SEWForCTC", {**_SPEECH, "squeeze_factor": 2}, _waves),
    (
        "sew-d",
        "SEWDForSequenceClassification",
        {**_SPEECH, "squeeze_factor": 2, "max_position_embeddings": 32, "position_buckets": 8},
        _waves,
    ),
    (
        "wav2vec2-conformer",
        "Wav2Vec2ConformerForCTC",
        {**_SPEECH, "conv_depthwise_kernel_size": 3, "max_source_positions": 64},
        _waves,
    ),
    (
        "wav2vec2-bert",
        "Wav2Vec2BertForSequenceClassification",
        {
            **HIDDEN,
            "feature_projection_input_dim": 16,
            "conv_depthwise_kernel_size": 3,
            "classifier_proj_size": 16,
            "apply_spec_augment": False,
        },
        _frames,
    ),
    (
        "audio-spectrogram-transformer",
        "ASTForAudioClassification",
        {
            **HIDDEN,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": 32,
            "num_mel_bins": 16,
            "num_labels": 5,
        },
        _bands,
    ),
    ("whisper-encoder", "WhisperForAudioClassification", _WHISPER, _spectrogram),
    ("whisper", "WhisperForConditionalGeneration", _WHISPER, _spectrogram_text),
    (
        "speech-to-text",
        "Speech2TextForConditionalGeneration",
        {
            **_SPECTRUM,
            "max_source_positions": 32,
            "max_target_positions": 16,
            "conv_channels": 32,
            "input_feat_per_channel": 16,
        },
        _frames_text,
    ),
    (
        "moonshine",
        "MoonshineForConditionalGeneration",
        {
            **{key: value for key, value in _SPECTRUM.items() if "token_id" in key},
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 64,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 2,
            "decoder_num_attention_heads": 2,
            "encoder_num_key_value_heads": 2,
            "decoder_num_key_value_heads": 2,
            "use_cache": False,
        },
        _waves_text,
    ),
    (
        "speecht5",
        "SpeechT5ForSpeechToText",
        {
            **{key: value for key, value in _SPECTRUM.items() if key != "d_model"},
            **_CONVOLUTIONS,
            "hidden_size": 32,
            "encoder_max_relative_position": 8,
            "max_text_positions": 16,
            "max_speech_positions": 64,
        },
        _waves_text,
    ),
    (
        "clap-audio",
        "ClapAudioModelWithProjection",
        {
            "spec_size": 32,
            "num_mel_bins": 16,
            "patch_size": 2,
            "patch_stride": [2, 2],
            "window_size": 4,
            "patch_embeds_hidden_size": 16,
            "hidden_size": 32,
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "projection_dim": 16,
            "enable_fusion": False,
        },
        lambda: {"input_features": torch.randn(2, 1, 64, 16)},
    ),
)

ARCHITECTURES = tuple(
    hugging_face(name, "audio", model, settings, inputs) for name, model, settings, inputs in _ROWS
)
