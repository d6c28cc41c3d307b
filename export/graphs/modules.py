"""The modules that become graphs: each takes and gives tensors in the order that its docstring names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtp.export.graphs.attention import Cache, Lengths, TowerProbe, active
from vtp.export.pruners.base import Pruner
from vtp.export.pruners.ops import gather_rows


@dataclass(frozen=True)
class Decoder:
    """The parts of a transformers decoder that graphs are made of."""

    model: Any  # the base model: .layers, .norm, .rotary_emb, .embed_tokens, .config
    lm_head: Any

    @property
    def layers(self) -> Sequence[Any]:
        return self.model.layers

    @property
    def kv_heads(self) -> int:
        return self.model.config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return self.layers[0].self_attn.head_dim

    @property
    def width(self) -> int:
        return self.model.config.hidden_size


class VisionEncoder(nn.Module):
    """pixel_values [B,3,H,W] -> image_features [B,N,C] and, where asked for, attention_scores float32 [B,N].

    `embed` turns pixels into the first hidden states; `layers` are only those that the features need.
    """

    def __init__(self, embed: nn.Module, layers: Sequence[nn.Module], has_cls: bool, scores: bool) -> None:
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.has_cls = has_cls
        self.scores = scores

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        watched = self.layers[-1].self_attn if self.scores else None
        probe = TowerProbe(watched, self.has_cls)  # type: ignore[arg-type]
        hidden = self.embed(pixel_values)
        with active(probe):
            for layer in self.layers:
                hidden = layer(hidden, None)
        features = hidden[:, 1:] if self.has_cls else hidden
        return (features,) if probe.scores is None else (features, probe.scores)


class Projector(nn.Module):
    """image_features [B,M,C] -> image_embeds [B,M,D]; M is N or, after a vision-site pruner, K."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, image_features: Tensor) -> Tensor:
        return self.projector(image_features)


class EmbedTokens(nn.Module):
    """input_ids int64 [B,T] -> inputs_embeds [B,T,D]."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids)


class Splice(nn.Module):
    """Put M image tokens in the place of a prompt's placeholders; number the positions 0, 1, 2, ...

    inputs_embeds [B,T,D], image_embeds [B,M,D], image_start int64 [B] (and keep_indices int64 [B,M] for
    original positions) -> prompt_embeds [B,S,D], position_ids int64 [B,S], next_position int64 [B], where
    S = T - placeholders + M.

    compact   pruned tokens never existed: positions run on without a gap.
    original  kept tokens keep the places they had among the N, and the text after the picture comes N later.
    """

    def __init__(self, placeholders: int, count: int, positions: str = "compact") -> None:
        super().__init__()
        self.placeholders = placeholders
        self.count = count
        self.original = positions == "original"

    def forward(
        self,
        inputs_embeds: Tensor,
        image_embeds: Tensor,
        image_start: Tensor,
        keep_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        text, visual = inputs_embeds.shape[1], image_embeds.shape[1]
        total = text - self.placeholders + visual
        place = torch.arange(total).unsqueeze(0)
        start = image_start.unsqueeze(1)
        before, inside = place < start, place < start + visual
        after = place - visual + self.placeholders
        source = torch.where(before, place, torch.where(inside, text + place - start, after))
        prompt = gather_rows(torch.cat([inputs_embeds, image_embeds], dim=1), source)
        if not self.original:
            return prompt, place + torch.zeros_like(start), torch.zeros_like(image_start) + total
        assert keep_indices is not None
        slot = (place - start).clamp(0, visual - 1)
        original = start + torch.gather(keep_indices, 1, slot)
        shifted = place - visual + self.count
        position_ids = torch.where(before, place, torch.where(inside, original, shifted))
        return prompt, position_ids, torch.zeros_like(image_start) + (total - visual + self.count)


class FeaturePruner(nn.Module):
    """A vision- or projector-site pruner over features [B,N,C]: -> keep_indices [B,K], kept rows [B,K,C].

    `cues` names the inputs; the first is the one whose rows are kept.
    """

    def __init__(self, pruner: Pruner, cues: Sequence[str]) -> None:
        super().__init__()
        self.pruner = pruner
        self.cues = tuple(cues)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(self.cues, inputs, strict=True))
        keep = self.pruner(**{name: given[name] for name in self.pruner.needs})
        return keep, gather_rows(inputs[0], keep)


class DecoderPruner(nn.Module):
    """A decoder-site pruner over S prompt tokens, N of them visual from image_start int64 [B] on.

    hidden_states [B,S,D], position_ids int64 [B,S] and the cues the method needs (attention_scores [B,S],
    keys [B,S,.]) -> keep_indices [B,K] within the image, kept_hidden_states [B,S-N+K,D] and
    kept_position_ids int64 [B,S-N+K]: the original positions.
    """

    def __init__(self, pruner: Pruner, cues: Sequence[str]) -> None:
        super().__init__()
        self.pruner = pruner
        self.cues = tuple(cues)

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, image_start: Tensor, *cues: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, kept = self.pruner.count, self.pruner.keep
        start = image_start.unsqueeze(1)
        visual = start + torch.arange(count).unsqueeze(0)
        given = {**dict(zip(self.cues, cues, strict=True)), "hidden_states": hidden_states}
        cut = {name: _rows(given[name], visual) for name in self.pruner.needs}
        keep = self.pruner(**cut)
        place = torch.arange(hidden_states.shape[1] - count + kept).unsqueeze(0)
        slot = (place - start).clamp(0, kept - 1)
        inside = start + torch.gather(keep, 1, slot)
        source = torch.where(
            place < start, place, torch.where(place < start + kept, inside, place + count - kept)
        )
        return keep, gather_rows(hidden_states, source), torch.gather(position_ids, 1, source)


def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
    return torch.gather(tensor, 1, indices) if tensor.dim() == 2 else gather_rows(tensor, indices)


class DecoderPart(nn.Module):
    """Decoder layers first..last on a bound cache, for prefill and single steps alike.

    hidden [B,S,D], position_ids int64 [B,S], seqlens_k int32 [B], total_sequence_length int32 [], then past
    key and value [B,G,capacity,d] per layer. A part with the last layer gives logits float32 [B,1,V] of every
    row's last real position; an earlier part gives hidden_states [B,S,D] and the cues that the pruner after
    it reads. Both then give present key and value per layer.
    """

    def __init__(
        self, decoder: Decoder, first: int, end: int, cues: Sequence[str] = (), normed_keys: bool = False
    ):
        super().__init__()
        self.decoder_layers = nn.ModuleList(list(decoder.layers)[first:end])
        self.rotary: Any = decoder.model.rotary_emb
        self.numbers = range(first, end)
        self.cues = tuple(cues)
        self.final = end == len(decoder.layers)
        self.norm = decoder.model.norm if self.final else None
        self.lm_head = decoder.lm_head if self.final else None
        # Keys of the layer after the cut; a method reads them with or without that layer's input norm.
        self.next_layer: Any = decoder.layers[end] if "keys" in cues else None
        self.normed_keys = normed_keys

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        pairs = zip(past[::2], past[1::2], strict=True)
        lengths = Lengths(seqlens_k, total_sequence_length)
        cache = Cache(dict(zip(self.numbers, pairs, strict=True)), lengths)
        if "attention_scores" in self.cues:
            cache.scored_layer = self.numbers[-1]
        rotary = self.rotary(hidden, position_ids)
        with active(cache):
            for layer in self.decoder_layers:
                hidden = layer(
                    hidden,
                    attention_mask=None,
                    position_embeddings=rotary,
                    past_key_values=cache,
                    use_cache=True,
                )
        present = tuple(tensor for number in self.numbers for tensor in cache.present[number])
        return (*self._answer(hidden, cache), *present)

    def _answer(self, hidden: Tensor, cache: Cache) -> tuple[Tensor, ...]:
        if self.norm is not None and self.lm_head is not None:
            # The last position only, and two-dimensional, so that tied weights need no transposed copy.
            last = cache.lengths.last_index(hidden.shape[1])
            row = gather_rows(hidden, last.unsqueeze(1)).squeeze(1)
            return (self.lm_head(self.norm(row)).float().unsqueeze(1),)
        cues: dict[str, Any] = {"attention_scores": cache.scores, "keys": self._keys(hidden)}
        return (hidden, *(cues[name] for name in self.cues if name in cues))

    def _keys(self, hidden: Tensor) -> Tensor | None:
        if self.next_layer is None:
            return None
        normed = self.next_layer.input_layernorm(hidden) if self.normed_keys else hidden
        return self.next_layer.self_attn.k_proj(normed)
