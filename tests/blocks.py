"""How the models of the zoo are laid out, block by block, for the eager oracle (`tests.eager`)."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.eager import Block, Step, Tokens, encode

Outputs = tuple[Tensor, ...]
Embedded = tuple[Tensor, Tensor | None]
"""The first x [B, N, C], and which tokens are no padding [B, N] (None: all)."""


def reference(
    name: str,
    model: nn.Module,
    inputs: dict[str, Tensor],
    steps: dict[int, Step],
    proportional: bool = True,
) -> Outputs:
    """Run a zoo model with reductions at some blocks, in double precision; flat outputs."""
    exact: Any = copy.deepcopy(model).double().eval()
    doubled = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    embed, blocks, finish = LAYOUTS[name]
    with torch.no_grad():
        x, real = embed(exact, doubled)
        tokens = encode(x, real, blocks(exact), steps, proportional)
        return finish(exact, tokens)


def _image_blocks(layers: Any) -> list[Block]:
    """Pre-norm blocks of ViT and DeiT."""
    return [
        Block(
            before=layer.layernorm_before,
            query=layer.attention.q_proj,
            key=layer.attention.k_proj,
            value=layer.attention.v_proj,
            join=lambda x, attended, layer=layer: x + layer.attention.o_proj(attended),
            mlp=lambda x, layer=layer: x + layer.mlp(layer.layernorm_after(x)),
            heads=layer.attention.num_attention_heads,
        )
        for layer in layers
    ]


def _embed_vit(model: Any, inputs: dict[str, Tensor]) -> Embedded:
    return model.vit.embeddings(inputs["pixel_values"]), None


def _finish_vit(model: Any, tokens: Tokens) -> Outputs:
    return (model.classifier(model.vit.layernorm(tokens.x)[:, 0]),)


def _embed_deit(model: Any, inputs: dict[str, Tensor]) -> Embedded:
    return model.deit.embeddings(inputs["pixel_values"]), None


def _finish_deit(model: Any, tokens: Tokens) -> Outputs:
    x = model.deit.layernorm(tokens.x)
    first, second = model.cls_classifier(x[:, 0]), model.distillation_classifier(x[:, 1])
    return (first + second) / 2, first, second


def _embed_dinov2(model: Any, inputs: dict[str, Tensor]) -> Embedded:
    return model.dinov2.embeddings(inputs["pixel_values"]), None


def _blocks_dinov2(model: Any) -> list[Block]:
    """Pre-norm blocks with LayerScale."""
    return [
        Block(
            before=layer.norm1,
            query=layer.attention.q_proj,
            key=layer.attention.k_proj,
            value=layer.attention.v_proj,
            join=lambda x, attended, layer=layer: (
                x + layer.layer_scale1(layer.attention.o_proj(attended))
            ),
            mlp=lambda x, layer=layer: x + layer.layer_scale2(layer.mlp(layer.norm2(x))),
            heads=layer.attention.num_attention_heads,
        )
        for layer in model.dinov2.encoder.layer
    ]


def _finish_dinov2(model: Any, tokens: Tokens) -> Outputs:
    x = model.dinov2.layernorm(tokens.x)
    return (model.classifier(torch.cat([x[:, 0], tokens.mean(x, start=1)], 1)),)


def _embed_clip(model: Any, inputs: dict[str, Tensor]) -> Embedded:
    vision = model.vision_model
    return vision.pre_layrnorm(vision.embeddings(inputs["pixel_values"])), None


def _blocks_clip(model: Any) -> list[Block]:
    return [
        Block(
            before=layer.layer_norm1,
            query=layer.self_attn.q_proj,
            key=layer.self_attn.k_proj,
            value=layer.self_attn.v_proj,
            join=lambda x, attended, layer=layer: x + layer.self_attn.out_proj(attended),
            mlp=lambda x, layer=layer: x + layer.mlp(layer.layer_norm2(x)),
            heads=layer.self_attn.num_heads,
        )
        for layer in model.vision_model.encoder.layers
    ]


def _finish_clip(model: Any, tokens: Tokens) -> Outputs:
    pooled = model.vision_model.post_layernorm(tokens.x[:, 0])
    return model.visual_projection(pooled), tokens.whole()


def _embed_text(base: str) -> Callable[[Any, dict[str, Tensor]], Embedded]:
    def embed(model: Any, inputs: dict[str, Tensor]) -> Embedded:
        x = getattr(model, base).embeddings(input_ids=inputs["input_ids"])
        return x, inputs["attention_mask"] == 1

    return embed


def _blocks_text(base: str) -> Callable[[Any], list[Block]]:
    """Post-norm blocks of BERT and RoBERTa."""

    def blocks(model: Any) -> list[Block]:
        return [
            Block(
                before=lambda x: x,
                query=layer.attention.self.query,
                key=layer.attention.self.key,
                value=layer.attention.self.value,
                join=lambda x, attended, layer=layer: layer.attention.output(attended, x),
                mlp=lambda x, layer=layer: layer.output(layer.intermediate(x), x),
                heads=layer.attention.self.num_attention_heads,
            )
            for layer in getattr(model, base).encoder.layer
        ]

    return blocks


def _finish_bert(model: Any, tokens: Tokens) -> Outputs:
    return (model.classifier(model.bert.pooler(tokens.x)),)


def _finish_bert_tokens(model: Any, tokens: Tokens) -> Outputs:
    return (model.classifier(tokens.whole()),)


def _finish_roberta(model: Any, tokens: Tokens) -> Outputs:
    return (model.classifier(tokens.x),)


def _embed_encoder(model: Any, inputs: dict[str, Tensor]) -> Embedded:
    padding = inputs.get("padding")
    return inputs["x"], None if padding is None else ~padding


def blocks_of_torch(encoder: Any) -> list[Block]:
    """Blocks of an nn.TransformerEncoder, pre- or post-norm."""
    return [_block_of_torch(layer) for layer in encoder.layers]


def _block_of_torch(layer: Any) -> Block:
    parts = zip(
        layer.self_attn.in_proj_weight.chunk(3), layer.self_attn.in_proj_bias.chunk(3), strict=True
    )
    query, key, value = (
        lambda x, weight=weight, bias=bias: nn.functional.linear(x, weight, bias)
        for weight, bias in parts
    )

    def join(x: Tensor, attended: Tensor) -> Tensor:
        total = x + layer.self_attn.out_proj(attended)
        return total if layer.norm_first else layer.norm1(total)

    def mlp(x: Tensor) -> Tensor:
        seen = layer.norm2(x) if layer.norm_first else x
        total = x + layer.linear2(layer.activation(layer.linear1(seen)))
        return total if layer.norm_first else layer.norm2(total)

    before = layer.norm1 if layer.norm_first else nn.Identity()
    return Block(before, query, key, value, join, mlp, layer.self_attn.num_heads)


def _finish_encoder(model: Any, tokens: Tokens) -> Outputs:
    return (tokens.whole(),)


LAYOUTS: dict[str, tuple[Any, Any, Any]] = {
    "vit": (_embed_vit, lambda m: _image_blocks(m.vit.layers), _finish_vit),
    "deit": (_embed_deit, lambda m: _image_blocks(m.deit.layers), _finish_deit),
    "dinov2": (_embed_dinov2, _blocks_dinov2, _finish_dinov2),
    "clip_vision": (_embed_clip, _blocks_clip, _finish_clip),
    "bert": (_embed_text("bert"), _blocks_text("bert"), _finish_bert),
    "bert_tokens": (_embed_text("bert"), _blocks_text("bert"), _finish_bert_tokens),
    "roberta": (_embed_text("roberta"), _blocks_text("roberta"), _finish_roberta),
    "encoder": (_embed_encoder, lambda m: blocks_of_torch(m.encoder), _finish_encoder),
    "encoder_padded": (_embed_encoder, lambda m: blocks_of_torch(m.encoder), _finish_encoder),
}
"""For each zoo model: how x begins, its blocks, and what becomes of the tokens in the end."""
