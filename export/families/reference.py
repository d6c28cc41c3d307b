"""Where the reference cuts an unmodified transformers model: tower, projector, decoder, places and positions.

A family's `reference` is a class of this kind. It is written with the model's own modules and knows none of
the exporter's graphs, so that a mistake in a graph cannot hide in what the graph is held against. Batch 1.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vtp.engines.errors import VtpError
from vtp.export.tower_cues import SCORES, block_of, reads_cls


def looked_at(name: str, weights: Tensor, has_cls: bool) -> Tensor:
    """The cue `name` of a tower's attention weights [1,H,P,P], with a row and a column more for CLS."""
    mean = weights.float().mean(dim=1)
    rows = mean[:, 0] if reads_cls(name, has_cls) else mean.mean(dim=1)
    return rows[:, int(has_cls) :]


class Reference:
    """LLaVA-1.5's, and what other families override.

    image_size  (height, width) of the picture
    view_grids  (rows, columns) of the patches of every view, where `pixel_values` are the patches of several
                views of unlike shapes, one view after another
    """

    def __init__(
        self,
        model: Any,
        image_size: tuple[int, int] | None = None,
        view_grids: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.model = model
        self.image_size = image_size
        self.view_grids = view_grids

    @property
    def tower(self) -> Any:
        """The vision model."""
        return self.model.model.vision_tower

    @property
    def blocks(self) -> list[Any]:
        """The tower's layers that the features need."""
        layers, layer = list(self.tower.encoder.layers), self.model.config.vision_feature_layer
        return layers[: range(len(layers) + 1)[layer]]

    @property
    def has_cls(self) -> bool:
        """Whether a CLS row goes before the tower's patches."""
        return hasattr(self.tower.embeddings, "class_embedding")

    @property
    def token_id(self) -> int:
        """The id that stands for a visual token in transformers' prompt."""
        return self.model.config.image_token_id

    @property
    def text(self) -> Any:
        """The decoder's base model: .layers, .norm, .rotary_emb, .embed_tokens."""
        return self.model.model.language_model

    @property
    def lm_head(self) -> Any:
        """hidden [.,D] -> logits [.,V]."""
        return self.model.lm_head

    @property
    def norm(self) -> Any:
        """hidden [.,D] -> what `lm_head` takes."""
        return self.text.norm

    def entering(self, layer: Any) -> Any:
        """The norm in front of a decoder layer's attention."""
        return layer.input_layernorm

    def cache(self) -> DynamicCache:
        """An empty cache of the decoder."""
        layers = range(len(self.text.layers))
        return DynamicCache() if all(map(self.attends, layers)) else DynamicCache(config=self.text.config)

    def attends(self, layer: int) -> bool:
        """Whether a decoder layer has keys and values; others have a state."""
        kinds = getattr(self.text.config, "layer_types", None)
        return not kinds or kinds[layer] not in ("conv", "linear_attention")

    def length(self, cache: DynamicCache, layer: int) -> int:
        """Tokens in a layer's cache; 0 for a layer that has a state instead."""
        return cache.get_seq_length(layer) if self.attends(layer) else 0

    def vision(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """image_features [1,P,C] in the order of the tokens, before the projector, and the cues `wanted`.

        attention_scores  float32 [1,P]: mean over heads of the CLS query's row, in the encoder layer that
                          makes the features; without CLS the attention received, mean over heads and rows.
        received_scores   the attention received, with CLS as well.
        middle_received   the same of an earlier layer, and early_scores what attention_scores are there.
        vision_keys       [1,P,C]: k_proj of the layer that makes the features.
        Needs eager attention. Raises VtpError for cues that the tower cannot give.
        """
        tower, layer = self.tower, self.model.config.vision_feature_layer
        if not isinstance(layer, int):
            raise VtpError(f"vision_feature_layer is {layer}; only a single layer is supported")
        number = range(len(tower.encoder.layers) + 1)[layer] - 1
        keys: list[Tensor] = []
        hook = tower.encoder.layers[max(number, 0)].self_attn.k_proj.register_forward_hook(
            lambda _module, _inputs, output: keys.append(output)
        )
        try:
            out = tower(
                pixel_values.to(self.model.dtype),
                output_hidden_states=True,
                output_attentions=True,
                return_dict=True,
            )
        finally:
            hook.remove()
        states = out.hidden_states[layer]
        has_cls = self.has_cls
        cropped = self.model.config.vision_feature_select_strategy == "default"
        cues = {"image_features": states[:, 1:] if cropped else states}
        if wanted and (number < 0 or cropped != has_cls):
            raise VtpError("the tower's cues need patch features that an encoder layer made, without CLS")
        for name in set(SCORES) & set(wanted):
            cues[name] = looked_at(name, out.attentions[block_of(name, number + 1)], has_cls)
        if "vision_keys" in wanted:
            cues["vision_keys"] = keys[0][:, 1:] if has_cls else keys[0]
        return cues

    def project(self, image_features: Tensor) -> Tensor:
        """Features [1,M,C] of any M patches -> embeddings [1,M,D]."""
        return self.model.model.multi_modal_projector(image_features)

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """All N visual tokens [1,N,D] as transformers makes them, and the places int64 [P] of the patches.

        `patches` [1,P,D] are the projected features; the same thing where every token is a patch.
        """
        del pixel_values
        return patches, torch.arange(patches.shape[1])

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids [1,T] -> [1,T,D], as the first layer takes them."""
        table = self.text.embed_tokens
        if self.token_id >= table.num_embeddings:  # visual tokens take its place, so that any row will do
            input_ids = torch.where(input_ids == self.token_id, 0, input_ids)
        return table(input_ids)

    def numbers(self, input_ids: Tensor) -> tuple[Tensor, int]:
        """Positions int64 [T] (or [A,T] of rotary embeddings with A axes) of a prompt, and the next one."""
        length = input_ids.shape[1]
        return torch.arange(length), length

    def turns(self, layer: int, hidden: Tensor, numbers: Tensor) -> Any:
        """A decoder layer's position_embeddings for tokens at `numbers` [S] or [A,S]."""
        del layer  # in most decoders all turn alike
        return self.text.rotary_emb(hidden, position_ids=numbers.unsqueeze(-2))

    def mask(self, layer: int, hidden: Tensor, image: Tensor, past: int) -> Tensor | None:
        """A layer's additive mask [1,1,S,past + S]; None where everything is seen.

        hidden [1,S,D] is a prompt on an empty cache, or a single token after `past` others; `image` int64 [n]
        are the places of visual tokens. In most decoders a token sees itself and those before it.
        """
        del image
        size = hidden.shape[1]
        if size == 1 or not self.attends(layer):
            return None
        assert past == 0, "a prompt starts on an empty cache"
        lowest = torch.full((size, size), torch.finfo(hidden.dtype).min, dtype=hidden.dtype)
        return lowest.triu(1)[None, None].to(hidden.device)

    def turn(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys [1,H,S,d], turned."""
        return sys.modules[type(self.text).__module__].apply_rotary_pos_emb(rows, rows, cos, sin)[0]

    def begin(self, input_ids: Tensor, hidden: Tensor) -> None:
        """Take note of what goes into the first layer: ids [1,S], and hidden [1,S,D] with visual tokens in
        their places."""

    def cut(self, stay: Tensor) -> None:
        """Only the tokens at the places `stay`, int64, go on."""

    def beside(self, layer: int, numbers: Tensor) -> dict[str, Any]:
        """What else a decoder layer takes, by name, for tokens at `numbers` as in `turns`."""
        del layer
        return self.beside_attention(numbers)

    def beside_attention(self, numbers: Tensor) -> dict[str, Any]:
        """What else its attention takes where it runs alone."""
        del numbers
        return {}

    def after(self, layer: int, hidden: Tensor, image: Tensor, kept: Tensor) -> Tensor:
        """What goes on from a layer's output [1,S,D] over a prompt whose visual tokens `kept` [n] stand at
        `image` [n]: for models that add to it there."""
        del layer, image, kept
        return hidden

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Eager attention, which alone returns its weights, for the time of a reference run."""
        parts: list[Any] = [self.tower, self.text]
        before = [part.config._attn_implementation for part in parts]
        training = self.model.training
        try:
            for part in parts:
                part.set_attn_implementation("eager")
            self.model.eval()
            yield
        finally:
            self.model.train(training)
            for part, name in zip(parts, before, strict=True):
                part.set_attn_implementation(name)


class FrameReference(Reference):
    """Those of videos: pixel_values are the frames [F,3,H,W] of one clip, which follow one another."""

    @property
    def token_id(self) -> int:
        return self.model.config.video_token_id

    def vision(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        cues = super().vision(pixel_values, wanted)
        return {name: values.flatten(0, 1).unsqueeze(0) for name, values in cues.items()}


class TiledReference(Reference):
    """LLaVA-NeXT's and LLaVA-OneVision's: pixel_values are views [V,3,H,W] of one picture."""

    def vision(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        cues = super().vision(pixel_values, wanted)
        return {name: self._packed(values) for name, values in cues.items()}

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        sizes, vision = torch.tensor([self.image_size]), self.model.config.vision_config
        tokens = self.model.model.get_image_features(
            pixel_values.to(self.model.dtype), sizes, return_dict=True
        )
        per_view = (vision.image_size // vision.patch_size) ** 2
        marks = self._pack(torch.ones(len(pixel_values), per_view, 1), torch.zeros(1))
        return tokens.pooler_output[0].unsqueeze(0), marks.flatten().nonzero().flatten()

    def _packed(self, values: Tensor) -> Tensor:
        """What every patch of every view has, [V,n,.] or [V,n]: in the tokens' order, [1,P,.] or [1,P]."""
        flat = values if values.dim() == 3 else values.unsqueeze(-1)
        packed = self._pack(flat, None)
        return (packed if values.dim() == 3 else packed.squeeze(-1)).unsqueeze(0)

    def _pack(self, views: Tensor, line_end: Tensor | None) -> Tensor:
        """transformers' own packing of one picture's views [V,n,C]: [P,C], or with ends of lines [N,C]."""
        config = self.model.config
        if hasattr(config, "vision_aspect_ratio"):
            named = {"vision_aspect_ratio": config.vision_aspect_ratio}
        else:
            named = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
        sizes = torch.tensor([self.image_size])
        return self.model.model.pack_image_features([views], sizes, image_newline=line_end, **named)[0][0]
