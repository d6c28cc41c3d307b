"""Example inputs for tracing. Dynamic axes are longer than 1, so that none of them becomes a constant."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vtp.export.onnx.emit import GraphInput
from vtp.export.plan.bundle_layout import BundleLayout
from vtp.export.plan.names import (
    BATCH,
    CAPACITY,
    IMAGES,
    PICTURES,
    ROWS,
    SEQUENCE,
    TEXT,
    VISUAL,
    axes,
)
from vtp.export.plan.schedule import keep_of
from vtp.export.tower_cues import SCORES
from vtp.runtime.bundle.caches import kv_pairs
from vtp.runtime.bundle.manifest import TILES

_B, _I, _T, _R = 2, 2, 5, 4  # prompts, pictures of one, its tokens, its text tokens
_CAPACITY = 8


def pixels(layout: BundleLayout) -> GraphInput:
    """A batch of pictures; of a picture in several views or in patches, these alone; of tiles that go apart,
    any number."""
    family = layout.family
    if family.patches:
        return GraphInput("pixel_values", zeros(layout, *family.patches))
    batch: dict[int, str] = {0: BATCH} if family.views == 1 else {0: TILES} if family.apart else {}
    views = _B if family.views == 1 else family.views
    return GraphInput("pixel_values", zeros(layout, views, 3, *family.image_size), batch)


def tower_state(layout: BundleLayout, names: Sequence[str]) -> list[GraphInput]:
    """A reference picture's state, of all rows of the tower; no row is zero, as none is in a picture."""
    rows, width = layout.family.tower_shape.rows, layout.family.feature_width
    return [GraphInput(name, torch.ones(_B, rows, width, dtype=layout.dtype), {0: BATCH}) for name in names]


def features(layout: BundleLayout) -> GraphInput:
    """A batch of patches, some or all; where the projector makes fewer of them, those of one clip."""
    if layout.family.pooled:
        return GraphInput("image_features", zeros(layout, 1, layout.family.pooled, layout.features))
    batch = zeros(layout, _B, layout.patches, layout.features)
    return GraphInput("image_features", batch, {0: BATCH, 1: VISUAL})


def feature_cues(layout: BundleLayout) -> dict[str, Tensor]:
    """Inputs of a vision- or projector-site pruner."""
    return {
        "image_features": zeros(layout, _B, layout.patches, layout.features),
        "vision_keys": zeros(layout, _B, layout.patches, layout.family.feature_width),
        "image_embeds": zeros(layout, _B, layout.patches, layout.family.decoder.wide(0)),
        **{name: torch.rand(_B, layout.patches) for name in SCORES},
        **{name: _pixels(layout) for name in ("picture", "reference_picture") if name in layout.needs},
        **_text(layout),
    }


def _pixels(layout: BundleLayout) -> Tensor:
    return zeros(layout, _B, 3, *layout.family.image_size)


def input_ids() -> GraphInput:
    """Token ids of prompts."""
    return GraphInput("input_ids", torch.zeros(_B, _T, dtype=torch.int64), {0: BATCH, 1: TEXT})


def prompt_text(layout: BundleLayout) -> list[GraphInput]:
    """A prompt's embeddings and where its pictures start."""
    embeds = zeros(layout, _B, _ids(layout), layout.family.decoder.wide(0))
    several = {1: IMAGES} if layout.family.several else {}
    start = torch.arange(_images(layout)).repeat(_B, 1) * layout.family.placeholders
    return [
        GraphInput("inputs_embeds", embeds, axes("inputs_embeds")),
        GraphInput("image_start", start, {0: BATCH, **several}),
    ]


def text_length(layout: BundleLayout) -> GraphInput:
    """Ids of each prompt, without padding."""
    return GraphInput("text_length", torch.full((_B,), _ids(layout), dtype=torch.int64), {0: BATCH})


def visual_tokens(layout: BundleLayout) -> tuple[GraphInput, GraphInput]:
    """The visual tokens of every picture that go into a prompt, and which of the N they are."""
    visual = max(2, min((keep_of(schedule) for schedule in layout.schedules), default=2))
    pictures = _B * _images(layout)
    dynamic = {0: PICTURES if layout.family.several else BATCH, 1: VISUAL}
    embeds = zeros(layout, pictures, visual, layout.family.decoder.wide(0))
    keep = torch.zeros(pictures, visual, dtype=torch.int64)
    return GraphInput("image_embeds", embeds, dynamic), GraphInput("keep_indices", keep, dynamic)


def decoder_inputs(layout: BundleLayout, source: str, first: int, end: int, text: bool) -> list[GraphInput]:
    """Inputs of decoder layers `first` to `end` - 1, with the places of the text's tokens if `text`."""
    decoder, rows = layout.family.decoder, {0: BATCH, 1: SEQUENCE}
    ahead = GraphInput("ahead", torch.zeros(_B, _T, dtype=torch.int64), rows)
    places = GraphInput("text_rows", _text(layout)["text_rows"], {0: BATCH, 1: ROWS})
    return [
        GraphInput(source, zeros(layout, _B, _T, decoder.wide(first)), rows),
        GraphInput("position_ids", _positions(layout, _T), rows),
        GraphInput("seqlens_k", torch.full((_B,), _T - 1, dtype=torch.int32), {0: BATCH}),
        GraphInput("total_sequence_length", torch.tensor(_T, dtype=torch.int32)),
        *([ahead] if layout.has_lookahead else []),
        *([places] if text else []),
        *([GraphInput("key_bias", torch.zeros(_B, _T), rows)] if layout.restore else []),
        *_past(layout, first, end),
    ]


def _past(layout: BundleLayout, first: int, end: int) -> list[GraphInput]:
    """Keys and values of the layers that have their own, then the states of layers."""
    decoder = layout.family.decoder
    past = [
        GraphInput(name, zeros(layout, _B, heads, _CAPACITY, size), {0: BATCH, 2: CAPACITY})
        for layer in decoder.cached(first, end)
        for heads, size in [layout.kv_shape(layer)]
        for name in kv_pairs([layer])
    ]
    for state in decoder.states_of(first, end, layout.dtype):
        empty = torch.zeros(_B, *state.shape, dtype=getattr(torch, state.dtype))
        past += [GraphInput(name, empty, {0: BATCH}) for name in state.pairs]
    return past


def decoder_cues(layout: BundleLayout, count: int, layer: int) -> dict[str, Tensor]:
    """Inputs of a decoder-site pruner in front of `layer` that `count` visual tokens reach."""
    decoder, total = layout.family.decoder, count + _R
    return {
        "hidden_states": zeros(layout, _B, total, decoder.wide(layer)),
        "position_ids": _positions(layout, total),
        "image_start": torch.ones(_B, 1, dtype=torch.int64),
        "attention_scores": torch.rand(_B, total),
        "next_scores": torch.rand(_B, total),
        "keys": zeros(layout, _B, total, math.prod(decoder.kv_shape(layer))),
        "text_attention": torch.rand(_B, decoder.heads, _R, total),
        "text_gravity": torch.rand(_B, _R, total),
        "image_embeds": zeros(layout, _B, layout.count, decoder.wide(0)),
        "previous_indices": torch.arange(count).repeat(_B, 1),
        **_text(layout),
    }


def zeros(layout: BundleLayout, *shape: int) -> Tensor:
    """Zeros in the bundle's dtype."""
    return torch.zeros(shape, dtype=layout.dtype)


def _text(layout: BundleLayout) -> dict[str, Tensor]:
    """What a method is told of the text."""
    return {
        "text_embeds": zeros(layout, _B, _R, layout.family.decoder.wide(0)),
        "text_mask": torch.ones(_B, _R),
        "text_rows": torch.arange(_R).repeat(_B, 1),
    }


def _positions(layout: BundleLayout, total: int) -> Tensor:
    """position_ids of `total` tokens."""
    numbers, count = torch.arange(total).repeat(_B, 1), layout.family.decoder.axes
    return numbers if count == 1 else numbers.unsqueeze(2).repeat(1, 1, count)


def _images(layout: BundleLayout) -> int:
    """Pictures of a prompt."""
    return _I if layout.family.several else 1


def _ids(layout: BundleLayout) -> int:
    """Ids of a prompt, its pictures' among them."""
    return _T + _images(layout) * (layout.family.placeholders - 1)
