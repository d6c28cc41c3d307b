"""The decoder as graphs: its parts on a bound key-value cache, with the cues that pruners read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtp.export.checkpoint.cache_name import with_cache
from vtp.export.graphs.attention.operators import Cache, LastRowProbe, LayerProbe, Lengths, active, softcapped
from vtp.export.graphs.rotary import AxesRotary, TextRotary
from vtp.export.graphs.splice import EmbedTokens
from vtp.export.pruners.ops import gather_rows
from vtp.runtime.bundle.caches import StateTensors


@dataclass(frozen=True)
class LayerState:
    """What some layers carry from token to token in place of keys and values; see `StateTensors`.

    shape  of one row
    dtype  None: the bundle's
    """

    name: str
    layers: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    def within(self, first: int, end: int, dtype: torch.dtype) -> StateTensors:
        """Of layers `first` to `end` - 1, in a bundle of `dtype`."""
        layers = [layer for layer in self.layers if first <= layer < end]
        name = str(self.dtype or dtype).removeprefix("torch.")
        return StateTensors(self.name, layers, list(self.shape), name)


@dataclass(frozen=True)
class Decoder:
    """The parts of a transformers decoder that graphs are made of.

    mask_kind  what a token of a prompt sees beside itself and those before it: nothing ("causal"), the whole
               prompt ("prompt"), or, if it is a visual token, all those of its picture ("image")
    windows    whether layers with a sliding window keep to it; if not, no prompt may outgrow the window
    near       whether only these look ahead (mask_kind "image"), and layers without a window are causal
    softcap    the logits are bent to stay within -softcap to softcap
    numbered   whether its layers are told the positions besides
    axes       numbers by which a position is told: position_ids are [B,S], or [B,S,axes] above 1
    deepstack  L: what is added to visual tokens after each of the first L layers travels beside the
               embeddings, which are then (1 + L)·D wide; the text's is 0
    norm       the norm in front of lm_head; None: the model's `norm`
    entering   what layers call the norm in front of their attention
    states     of layers that have no attention
    """

    model: Any  # the base model: .layers, .norm, .rotary_emb, .embed_tokens, .config
    lm_head: Any
    mask_kind: str = "causal"
    windows: bool = False
    near: bool = False
    softcap: float | None = None
    numbered: bool = False
    axes: int = 1
    deepstack: int = 0
    norm: Any = None
    entering: str = "input_layernorm"
    states: tuple[LayerState, ...] = ()

    @property
    def final_norm(self) -> Any:
        """hidden [.,D] -> what lm_head takes."""
        return self.norm if self.norm is not None else self.model.norm

    @property
    def layers(self) -> Sequence[Any]:
        return self.model.layers

    @property
    def rotary(self) -> Any:
        """hidden, position_ids -> cos and sin [B,S,d]."""
        own = self.model.rotary_emb
        if self.axes > 1:
            return AxesRotary(own, self.axes)
        return TextRotary(own) if hasattr(own, "recomposition_frequencies") else own

    @property
    def heads(self) -> int:
        return self.model.config.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.model.config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return self.layers[self.cached(0, len(self.layers))[0]].self_attn.head_dim

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    def turning(self, layer: int) -> str | None:
        """Name of a layer's rotary embedding, where kinds of layers have their own."""
        own = getattr(self.model.rotary_emb, "layer_types", None)
        return self.model.config.layer_types[layer] if own else None

    def wide(self, layer: int) -> int:
        """Width of what enters a layer, with what is still to be added after it and later ones."""
        return self.width * (1 + max(0, self.deepstack - layer))

    def kv_shape(self, layer: int) -> tuple[int, int]:
        """(heads, head size) of a layer's keys and values."""
        del layer  # in most decoders all are alike
        return self.kv_heads, self.head_dim

    @property
    def owners(self) -> Mapping[int, int]:
        """Layers without keys and values of their own -> the layer whose they read."""
        return {}

    def cached(self, first: int, end: int) -> list[int]:
        """Those of the layers `first` to `end` - 1 that have keys and values of their own: neither those that
        read another's, nor those with a state."""
        others = {*self.owners, *(layer for state in self.states for layer in state.layers)}
        return [layer for layer in range(first, end) if layer not in others]

    def states_of(self, first: int, end: int, dtype: torch.dtype) -> list[StateTensors]:
        """The states of layers `first` to `end` - 1, in a bundle of `dtype`."""
        found = [state.within(first, end, dtype) for state in self.states]
        return [state for state in found if state.layers]

    @property
    def last_cut(self) -> int:
        """The last layer before which the decoder can be cut: no layer behind a cut reads one before it."""
        return min([len(self.layers) - 1, *self.owners.values()])

    def embedding(self, absent: int | None) -> nn.Module:
        """input_ids -> inputs_embeds; `absent` is an id that the table has no row for."""
        return EmbedTokens(self.model.embed_tokens, self.wide(0) - self.width, absent)

    def part(
        self,
        first: int,
        end: int,
        cues: Sequence[str] = (),
        normed_keys: bool = False,
        biased: bool = False,
    ) -> DecoderPart:
        """Layers `first` to `end` - 1 as a graph."""
        return DecoderPart(self, first, end, cues, normed_keys, biased)


# Cues that a decoder part computes; those named TEXT_CUES need the places of the text tokens.
PART_CUES = ("attention_scores", "next_scores", "keys", "text_attention", "text_gravity")
TEXT_CUES = ("text_attention", "text_gravity")


class DecoderPart(nn.Module):
    """Decoder layers first..last on a bound cache, for prefill and single steps alike.

    hidden [B,S,D], position_ids int64 [B,S] or [B,S,A], seqlens_k int32 [B], total_sequence_length int32 [],
    then the lookahead int64 [B,S] if visual tokens see all those of their picture (mask_kind "image"), then
    text_rows int64 [B,R] if a cue of TEXT_CUES is asked for, then key_bias float32 [B,S] if `biased`, then
    past key and value [B,G,capacity,d] per layer that has its own (d has `restore.COLUMNS` more if `biased`),
    then the states of layers, kind by kind. A part with the last layer gives logits float32 [B,1,V] of every
    row's last real position; an earlier part gives hidden_states [B,S,D] and the cues that the pruner after
    it reads. Both then give keys, values and states in the order of the past ones.
    """

    def __init__(
        self,
        decoder: Decoder,
        first: int,
        end: int,
        cues: Sequence[str] = (),
        normed_keys: bool = False,
        biased: bool = False,
    ):
        super().__init__()
        self.decoder_layers = nn.ModuleList(list(decoder.layers)[first:end])
        self.rotary: Any = decoder.rotary
        self.numbers = range(first, end)
        self.cached, self.owners = decoder.cached(first, end), decoder.owners
        self.places = [
            (state.name, layer) for state in decoder.states for layer in state.layers if first <= layer < end
        ]
        self.turning = [decoder.turning(layer) for layer in range(first, min(end + 1, len(decoder.layers)))]
        self.mask_kind, self.softcap = decoder.mask_kind, decoder.softcap
        self.windows, self.near, self.numbered = decoder.windows, decoder.near, decoder.numbered
        self.width = decoder.width
        self.cues = tuple(cues)
        self.reads_text = bool(set(cues) & set(TEXT_CUES))
        self.final = end == len(decoder.layers)
        self.norm = decoder.final_norm if self.final else None
        self.lm_head = decoder.lm_head if self.final else None
        # The layer after the cut: its keys (with or without its input norm), and what it is about to see.
        self.next_layer: Any = decoder.layers[end] if {"keys", "next_scores"} & set(cues) else None
        self.normed_keys, self.entering, self.biased = normed_keys, decoder.entering, biased

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        """Logits, or hidden states and cues; then present keys and values. The class has the shapes."""
        past = list(others)
        lookahead = past.pop(0) if self.mask_kind == "image" else None
        rows = past.pop(0) if self.reads_text else None
        if self.mask_kind == "prompt":
            lookahead = torch.zeros_like(position_ids) + hidden.shape[1]
        key_bias = past.pop(0) if self.biased else None
        keys = 2 * len(self.cached)
        pairs = zip(past[:keys:2], past[1:keys:2], strict=True)
        lengths = Lengths(seqlens_k, total_sequence_length, lookahead, self.windows, self.near, key_bias)
        probe = LayerProbe(self.numbers[-1], rows)
        cache = Cache(
            dict(zip(self.cached, pairs, strict=True)),
            lengths,
            probe=probe if self.cues else None,
            owners=self.owners,
            states=dict(zip(self.places, past[keys:], strict=True)),
        )
        turns = self._turns(hidden[..., : self.width], position_ids)
        with active(cache):
            hidden, beside = self._run(hidden, turns, cache, self._told(position_ids))
        present = [tensor for number in self.cached for tensor in cache.present[number]]
        present += [cache.carried[place] for place in self.places]
        if self.final:
            return (self._logits(hidden, lengths), *present)
        told = self._told(position_ids)
        cues = self._cues(hidden, turns, probe, lengths, told)
        return (torch.cat([hidden, *beside], dim=-1) if beside else hidden, *cues, *present)

    def _told(self, position_ids: Tensor) -> dict[str, Any]:
        """What else the layers, and the attention of one where it runs alone, are told."""
        return {"position_ids": position_ids} if self.numbered else {}

    def _run(
        self, hidden: Tensor, turns: Sequence[tuple[Tensor, Tensor]], cache: Cache, told: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor]]:
        """What comes out of the layers, and what goes on beside it to later ones."""
        hidden, *deep = hidden.split(self.width, dim=-1) if hidden.shape[-1] > self.width else (hidden,)
        for layer, turn in zip(self.decoder_layers, turns, strict=False):
            hidden = layer(
                hidden,
                attention_mask=None,
                position_embeddings=turn,
                use_cache=True,
                **with_cache(layer, cache),
                **told,
            )
            hidden = hidden + deep.pop(0) if deep else hidden
        return hidden, deep

    def _turns(self, hidden: Tensor, position_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """cos and sin for every layer of this part, and for the one after it."""
        kinds = {
            kind: self.rotary(hidden, position_ids, *(() if kind is None else (kind,)))
            for kind in dict.fromkeys(self.turning)
        }
        return [kinds[kind] for kind in self.turning]

    def _logits(self, hidden: Tensor, lengths: Lengths) -> Tensor:
        """Of the last position only, and two-dimensional, so that tied weights need no transposed copy."""
        assert self.norm is not None and self.lm_head is not None  # a final part has both
        row = gather_rows(hidden, lengths.last_index(hidden.shape[1]).unsqueeze(1)).squeeze(1)
        return softcapped(self.lm_head(self.norm(row)).float(), self.softcap).unsqueeze(1)

    def _cues(
        self,
        hidden: Tensor,
        turns: list[tuple[Tensor, Tensor]],
        probe: LayerProbe,
        lengths: Lengths,
        told: dict[str, Any],
    ) -> list[Tensor]:
        read: dict[str, Callable[[], Any]] = {
            "attention_scores": lambda: probe.last,
            "text_attention": lambda: probe.text,
            "text_gravity": lambda: _gravity(turns[-2], probe),
            "keys": lambda: self._keys(hidden),
            "next_scores": lambda: self._next_scores(hidden, turns[-1], lengths, told),
        }
        return [read[name]() for name in self.cues]

    def _keys(self, hidden: Tensor) -> Tensor:
        return self.next_layer.self_attn.k_proj(self._entering(hidden) if self.normed_keys else hidden)

    def _entering(self, hidden: Tensor) -> Tensor:
        """What the layer after the cut attends with."""
        return getattr(self.next_layer, self.entering)(hidden)

    def _next_scores(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], lengths: Lengths, told: dict[str, Any]
    ) -> Tensor:
        """The last token's row in the layer that comes next: its attention runs up to that row."""
        probe = LayerProbe(self.numbers[-1] + 1)
        with active(LastRowProbe(probe, lengths)):
            self.next_layer.self_attn(
                self._entering(hidden), position_embeddings=rotary, attention_mask=None, **told
            )
        assert probe.last is not None  # the attention function read it
        return probe.last


def _gravity(rotary: tuple[Tensor, Tensor], probe: LayerProbe) -> Tensor:
    """Products float32 [B,R,S] of all-ones queries at the text's places and all-ones keys, both turned.

    A pair of ones turned by an angle a is (cos a - sin a, cos a + sin a), and two such pairs have the
    product 2 cos(a - b); cos and sin [B,S,d] hold every angle twice.
    """
    cos, sin = (part.float() for part in rotary)
    assert probe.text_rows is not None  # given with every cue of TEXT_CUES
    places = probe.text_rows.clamp(0, cos.shape[1] - 1)
    products = torch.matmul(gather_rows(cos, places), cos.transpose(1, 2))
    products = products + torch.matmul(gather_rows(sin, places), sin.transpose(1, 2))
    return products * cos.shape[2] ** -0.5
