"""A small vision transformer for cluttered digit canvases, and its trained instance."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.checkpoints import load

CHECKPOINT = Path(__file__).with_name("digits.safetensors")


@dataclass(frozen=True)
class DigitsConfig:
    """Sizes of a `DigitsViT`.

    Attributes:
        image_size: canvas side in pixels, a multiple of the stem's total stride of 4.
        stem_width: channels between the two convolutions of the stem.
        width: channels of a token, a multiple of `heads`.
        depth: number of transformer blocks.
        heads: attention heads per block.
        mlp_ratio: hidden width of an MLP divided by `width`.
        classes: number of digit classes.
    """

    image_size: int = 48
    stem_width: int = 32
    width: int = 128
    depth: int = 6
    heads: int = 4
    mlp_ratio: int = 4
    classes: int = 10

    @property
    def patches(self) -> int:
        """Number of patch tokens (the class token is not counted)."""
        return (self.image_size // 4) ** 2


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map float tokens [B, N, C] to tokens [B, N, C]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        x = x.transpose(1, 2).reshape(batch, tokens, width)
        return self.proj(x)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map float tokens [B, N, C] to tokens [B, N, C]."""
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each with a residual connection."""

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, config.mlp_ratio * config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map float tokens [B, N, C] to tokens [B, N, C]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class DigitsViT(nn.Module):
    """Vision transformer that classifies the one whole digit on a cluttered canvas."""

    def __init__(self, config: DigitsConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DigitsConfig()
        self.stem = nn.Sequential(
            nn.Conv2d(1, config.stem_width, kernel_size=3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(config.stem_width, config.width, kernel_size=3, stride=2, padding=1),
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.patches, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)
        self._initialise()

    def _initialise(self) -> None:
        """Draw the embeddings and the linear weights from narrow normal distributions."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def embed(self, pixels: Tensor) -> Tensor:
        """Map float pixels [B, 1, H, W] to tokens [B, 1 + patches, C], the class token first."""
        x = self.stem(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return x + self.pos_embed

    def encode(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, C] to normalised tokens [B, N, C] through all blocks."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Map float pixels [B, 1, H, W] in 0..1 to {"logits": float [B, classes]}."""
        return {"logits": self.head(self.encode(self.embed(pixels))[:, 0])}


def trained() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Load the checkpoint that lies beside this file.

    Returns:
        The model in evaluation mode and example inputs: float32 pixels [2, 1, 48, 48].

    Raises:
        FileNotFoundError: if the checkpoint has not been trained yet.
    """
    model = load(DigitsViT(), CHECKPOINT, "examples.digits.train")
    size = model.config.image_size
    generator = torch.Generator().manual_seed(0)
    return model, (torch.rand(2, 1, size, size, generator=generator),)
