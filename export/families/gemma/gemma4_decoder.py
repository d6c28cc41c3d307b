"""Gemma 4's decoder: layers of two kinds, some without keys and values, each with an input of its own.

Source: transformers' modeling_gemma4.py. Layers with a sliding window and layers without differ in heads,
head size and rotary embedding. The last layers of smaller models read the keys and values of the last one of
their kind that has some. There, too, every layer has an input of its own (per-layer embeddings): a row of a
second table for the token, that of the padding token for a visual one, and a projection of the token's
embedding. These rows travel beside the embeddings, `side` numbers for every layer that is still to come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtp.export.graphs.attention.operators import Cache
from vtp.export.graphs.decoder import Decoder, DecoderPart


def sharing(config: Any) -> dict[int, int]:
    """Layers without keys and values of their own -> the layer whose they read, by the text config."""
    first = config.num_hidden_layers - config.num_kv_shared_layers
    last = {kind: layer for layer, kind in enumerate(config.layer_types[:first])}
    return {layer: last[config.layer_types[layer]] for layer in range(first, config.num_hidden_layers)}


@dataclass(frozen=True)
class Gemma4Decoder(Decoder):
    """As `Decoder`; `image` is the id that stands for a visual token, read as padding by the second table."""

    image: int = 0

    @property
    def side(self) -> int:
        """Width of a layer's own input; 0: it has none."""
        return int(self.model.config.hidden_size_per_layer_input or 0)

    def wide(self, layer: int) -> int:
        return self.width + self.side * (len(self.layers) - layer)

    def kv_shape(self, layer: int) -> tuple[int, int]:
        own = self.model.config.per_layer_config[layer]
        return own.num_key_value_heads, own.head_dim

    @property
    def owners(self) -> Mapping[int, int]:
        return sharing(self.model.config)

    def embedding(self, absent: int | None) -> nn.Module:
        del absent  # padding takes the place of visual tokens, as in transformers
        return _Embedding(self)

    def part(self, *asked: Any, **more: Any) -> DecoderPart:
        return _Part(self, *asked, **more)


class _Embedding(nn.Module):
    """input_ids int64 [B,T] -> inputs_embeds [B,T,D], the second table's row beside it if there is one."""

    def __init__(self, decoder: Gemma4Decoder) -> None:
        super().__init__()
        self.embedding = decoder.model.embed_tokens
        self.beside = decoder.model.embed_tokens_per_layer if decoder.side else None
        self.image, self.padding = decoder.image, decoder.model.config.pad_token_id

    def forward(self, input_ids: Tensor) -> Tensor:
        input_ids = torch.where(input_ids == self.image, self.padding, input_ids)
        embeds = self.embedding(input_ids)
        return embeds if self.beside is None else torch.cat([embeds, self.beside(input_ids)], dim=-1)


class _Part(DecoderPart):
    """Layers of Gemma 4. The first part turns the second table's rows into the layers' inputs."""

    def __init__(self, decoder: Gemma4Decoder, first: int, *others: Any) -> None:
        super().__init__(decoder, first, *others)
        self.side = decoder.side
        starts = first == 0 and self.side > 0
        self.inputs = _LayerInputs(decoder.model) if starts else None

    def _told(self, position_ids: Tensor) -> dict[str, Any]:
        del position_ids
        return {"shared_kv_states": {}}

    def _run(
        self, hidden: Tensor, turns: Sequence[tuple[Tensor, Tensor]], cache: Cache, told: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor]]:
        hidden, coming = hidden[..., : self.width], hidden[..., self.width :]
        if self.inputs is not None:
            coming = self.inputs(hidden, coming)
        for layer, turn in zip(self.decoder_layers, turns, strict=False):
            hidden = _through(
                layer,
                hidden,
                coming[..., : self.side] if self.side else None,
                attention_mask=None,
                position_embeddings=turn,
                past_key_values=cache,
                **told,
            )
            coming = coming[..., self.side :]
        return hidden, [coming] if self.side and not self.final else []


def _through(layer: Any, hidden: Tensor, own: Tensor | None, **given: Any) -> Tensor:
    """What a layer makes of hidden [B,S,D] and its own input [B,S,side]; `given` goes to its attention.

    transformers' own multiplies in place at the end, and such a graph takes twice as long to trace.
    """
    attended, _ = layer.self_attn(layer.input_layernorm(hidden), **given)
    hidden = hidden + layer.post_attention_layernorm(attended)
    fed = layer.mlp(layer.pre_feedforward_layernorm(hidden))
    hidden = hidden + layer.post_feedforward_layernorm(fed)
    if own is not None:
        gated = layer.act_fn(layer.per_layer_input_gate(hidden)) * own
        hidden = hidden + layer.post_per_layer_input_norm(layer.per_layer_projection(gated))
    return hidden * layer.layer_scalar


class _LayerInputs(nn.Module):
    """embeds [B,S,D] and the second table's rows [B,S,L·side] -> the inputs of L layers, [B,S,L·side]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.projection, self.norm = model.per_layer_model_projection, model.per_layer_projection_norm
        self.shrink, self.scale = model.per_layer_model_projection_scale, model.per_layer_input_scale
        self.side = model.hidden_size_per_layer_input

    def forward(self, embeds: Tensor, rows: Tensor) -> Tensor:
        projected = (self.projection(embeds) * self.shrink).unflatten(-1, (-1, self.side))
        return (self.norm(projected).flatten(-2) + rows) * self.scale
