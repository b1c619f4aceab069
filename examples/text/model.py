"""A BERT encoder of sentences with mean pooling, and its trained instance."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from examples import checkpoints
from examples.text.data import encode, sentences
from examples.text.tokens import LENGTH, vocabulary

CHECKPOINT = Path(__file__).with_name("text.safetensors")


def config() -> BertConfig:
    """Return the sizes of the encoder; it is trained without dropout."""
    return BertConfig(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=LENGTH,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


class SentenceEncoder(nn.Module):
    """Maps a sentence to a unit vector; neighbours in the text are drawn together."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = BertModel(config(), add_pooling_layer=False)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map int64 tokens [B, T] and their mask [B, T] to float hidden states [B, T, 128]."""
        outputs = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        states: Tensor = outputs.last_hidden_state
        return states

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Average hidden states [B, T, 128] over unmasked tokens, to unit vectors [B, 128]."""
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        return F.normalize(mean, dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Map int64 tokens and their mask, [B, T <= 64] each, to {"embedding": float [B, 128]}."""
        return {"embedding": self.pool(self.hidden(input_ids, attention_mask), attention_mask)}


def load() -> SentenceEncoder:
    """Load the checkpoint that lies beside this file.

    The file holds float16 numbers; the model computes in float32.

    Raises:
        FileNotFoundError: if the checkpoint has not been trained yet.
    """
    return checkpoints.load(SentenceEncoder(), CHECKPOINT, "examples.text.train")


def sentence_encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the trained encoder and its inputs for eight calibration sentences, int64 [8, 64]."""
    inputs = encode(sentences("calibration")[:8])
    return load(), {name: torch.from_numpy(array) for name, array in inputs.items()}
