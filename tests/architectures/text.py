"""Text encoders, with absolute, relative and rotary positions, and encoder-decoder models."""

from collections.abc import Callable

import torch

from tests.architectures.base import (
    IDS,
    TEXT,
    Given,
    Settings,
    hugging_face,
    pairs,
    texts,
)

_NARROW = {**TEXT, "embedding_size": 16}
_SEQ2SEQ: Settings = {
    **IDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 66,
    "decoder_start_token_id": 2,
    "use_cache": False,
}
_T5: Settings = {
    **IDS,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "use_cache": False,
}
_DEBERTA: Settings = {
    **TEXT,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "type_vocab_size": 2,
}


def _boxes() -> Given:
    """Layout models take the place of each word on the page."""
    corner = torch.randint(0, 40, (2, 16, 2))
    return {**texts(), "bbox": torch.cat([corner, corner + 9], -1)}


def _ids() -> Given:
    """Leave the mask out: FNet takes none, Nystromformer fails with one in transformers 5.23."""
    return {"input_ids": texts()["input_ids"]}


_ROWS: tuple[tuple[str, str, Settings, Callable[[], Given]], ...] = (
    ("bert", "BertForSequenceClassification", TEXT, texts),
    (
        "bert-eager",
        "BertForSequenceClassification",
        {**TEXT, "attn_implementation": "eager"},
        texts,
    ),
    ("bert-tokens", "BertForTokenClassification", TEXT, texts),
    ("roberta", "RobertaForSequenceClassification", TEXT, texts),
    ("xlm-roberta", "XLMRobertaForSequenceClassification", TEXT, texts),
    ("xlm-roberta-xl", "XLMRobertaXLForSequenceClassification", TEXT, texts),
    ("roberta-prelayernorm", "RobertaPreLayerNormForSequenceClassification", TEXT, texts),
    ("camembert", "CamembertForTokenClassification", TEXT, texts),
    (
        "distilbert",
        "DistilBertForSequenceClassification",
        {**IDS, "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64},
        texts,
    ),
    ("albert", "AlbertForSequenceClassification", _NARROW, texts),
    ("electra", "ElectraForSequenceClassification", _NARROW, texts),
    ("mpnet", "MPNetForSequenceClassification", TEXT, texts),
    ("deberta", "DebertaForSequenceClassification", _DEBERTA, texts),
    (
        "deberta-v2",
        "DebertaV2ForSequenceClassification",
        {**_DEBERTA, "position_buckets": 8, "share_att_key": True},
        texts,
    ),
    (
        "modernbert",
        "ModernBertForSequenceClassification",
        {
            **TEXT,
            "cls_token_id": 0,
            "sep_token_id": 2,
            "global_attn_every_n_layers": 3,
            "local_attention": 8,
        },
        texts,
    ),
    ("nomic-bert", "NomicBertModel", {**TEXT, "head_dim": 16}, texts),
    ("eurobert", "EuroBertForSequenceClassification", {**TEXT, "mask_token_id": 3}, texts),
    ("ernie", "ErnieForSequenceClassification", TEXT, texts),
    ("megatron-bert", "MegatronBertForSequenceClassification", TEXT, texts),
    ("splinter", "SplinterModel", TEXT, texts),
    ("rembert", "RemBertForSequenceClassification", {**TEXT, "input_embedding_size": 16}, texts),
    ("roformer", "RoFormerForSequenceClassification", _NARROW, texts),
    ("esm", "EsmForSequenceClassification", {**TEXT, "position_embedding_type": "rotary"}, texts),
    ("esm-absolute", "EsmForTokenClassification", {**TEXT, "mask_token_id": 3}, texts),
    ("luke", "LukeForSequenceClassification", {**TEXT, "entity_vocab_size": 10}, texts),
    ("lilt", "LiltForSequenceClassification", {**TEXT, "hidden_size": 48}, _boxes),
    ("layoutlm", "LayoutLMForSequenceClassification", TEXT, _boxes),
    ("ibert", "IBertForSequenceClassification", TEXT, texts),
    (
        "mobilebert",
        "MobileBertForSequenceClassification",
        {
            **TEXT,
            "embedding_size": 16,
            "intra_bottleneck_size": 16,
            "true_hidden_size": 16,
            "num_feedforward_networks": 2,
        },
        texts,
    ),
    (
        "squeezebert",
        "SqueezeBertForSequenceClassification",
        {**_NARROW, "embedding_size": 32},
        texts,
    ),
    (
        "nystromformer",
        "NystromformerForSequenceClassification",
        {**TEXT, "num_landmarks": 4, "segment_means_seq_len": 16, "conv_kernel_size": 3},
        _ids,
    ),
    ("convbert", "ConvBertForSequenceClassification", {**_NARROW, "head_ratio": 2}, texts),
    ("fnet", "FNetForSequenceClassification", {**TEXT, "tpu_short_seq_length": 16}, _ids),
    ("yoso", "YosoForSequenceClassification", {**TEXT, "use_expectation": True}, texts),
    ("mra", "MraForSequenceClassification", TEXT, texts),
    (
        "longformer",
        "LongformerForSequenceClassification",
        {**TEXT, "attention_window": 8, "sep_token_id": 2},
        texts,
    ),
    (
        "big-bird",
        "BigBirdForSequenceClassification",
        {**TEXT, "attention_type": "original_full"},
        texts,
    ),
    (
        "funnel",
        "FunnelForSequenceClassification",
        {
            **IDS,
            "d_model": 32,
            "n_head": 2,
            "d_head": 16,
            "d_inner": 64,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
        texts,
    ),
    (
        "xlnet",
        "XLNetForSequenceClassification",
        {**IDS, "d_model": 32, "n_layer": 3, "n_head": 2, "d_inner": 64, "use_mems_eval": False},
        texts,
    ),
    (
        "xlm",
        "XLMForSequenceClassification",
        {**IDS, "emb_dim": 32, "n_layers": 3, "n_heads": 2, "max_position_embeddings": 66},
        texts,
    ),
    (
        "flaubert",
        "FlaubertForSequenceClassification",
        {**IDS, "emb_dim": 32, "n_layers": 3, "n_heads": 2, "max_position_embeddings": 66},
        texts,
    ),
    (
        "canine",
        "CanineForSequenceClassification",
        {
            **TEXT,
            "max_position_embeddings": 256,
            "num_hash_functions": 2,
            "num_hash_buckets": 32,
            "local_transformer_stride": 16,
            "downsampling_rate": 4,
        },
        texts,
    ),
    ("t5-encoder", "T5EncoderModel", _T5, texts),
    ("t5", "T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 1}, pairs),
    ("mt5", "MT5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 1}, pairs),
    ("umt5-encoder", "UMT5EncoderModel", _T5, texts),
    ("bart", "BartForConditionalGeneration", _SEQ2SEQ, pairs),
    ("mbart", "MBartForConditionalGeneration", _SEQ2SEQ, pairs),
    ("pegasus", "PegasusForConditionalGeneration", _SEQ2SEQ, pairs),
    ("marian", "MarianMTModel", _SEQ2SEQ, pairs),
    ("m2m-100", "M2M100ForConditionalGeneration", _SEQ2SEQ, pairs),
    ("blenderbot", "BlenderbotForConditionalGeneration", _SEQ2SEQ, pairs),
)

ARCHITECTURES = tuple(
    hugging_face(name, "text", model, settings, inputs) for name, model, settings, inputs in _ROWS
)
