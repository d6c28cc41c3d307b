"""Seams of the families whose tokens are several patches of the tower: InternVL, Idefics3, SmolVLM."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from vtp.export.seams import Seams


class InternVLSeams(Seams):
    """InternVL's: pixel_values [V,3,H,W] are the views of one picture; the tower has CLS."""

    def vision(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        tower, layer = self.tower, self.model.config.vision_feature_layer
        number = range(len(tower.encoder.layer) + 1)[layer] - 1
        keys: list[Tensor] = []
        attention = tower.encoder.layer[number].attention
        hook = attention.k_norm.register_forward_hook(lambda _module, _inputs, output: keys.append(output))
        try:
            out = self._look(tower, pixel_values)
        finally:
            hook.remove()
        states = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        cues = {"image_features": self._tokens_of(states[:, 1:])}
        if "attention_scores" in wanted:
            row = out.attentions[number].float().mean(dim=1)[:, 0, 1:]
            cues["attention_scores"] = self._tokens_of(row.unsqueeze(2)).mean(dim=2)
        if "vision_keys" in wanted:
            cues["vision_keys"] = self._tokens_of(keys[0][:, 1:])
        return cues

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        config = self.model.config
        tokens = self.model.model.get_image_features(
            pixel_values,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
        ).pooler_output
        return tokens.flatten(0, 1).unsqueeze(0), torch.arange(patches.shape[1])

    def _look(self, tower: Any, pixel_values: Tensor) -> Any:
        return tower(
            pixel_values.to(self.model.dtype),
            output_hidden_states=True,
            output_attentions=True,
            return_dict=True,
        )

    def _tokens_of(self, patches: Tensor) -> Tensor:
        """transformers' own pixel shuffle of all views [V,n,C]: [1,P,4C]."""
        side = int(patches.shape[1] ** 0.5)
        square = patches.reshape(len(patches), side, side, -1)
        tokens = self.model.model.pixel_shuffle(square, scale_factor=self.model.config.downsample_ratio)
        return tokens.flatten(0, 2).unsqueeze(0)


class Idefics3Seams(Seams):
    """Idefics3's and SmolVLM's: pixel_values [V,3,H,W] are the tiles of one picture; no CLS."""

    @property
    def tower(self) -> Any:
        return self.model.model.vision_model

    @property
    def text(self) -> Any:
        return self.model.model.text_model

    def vision(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        keys: list[Tensor] = []
        last = self.tower.encoder.layers[-1].self_attn.k_proj
        hook = last.register_forward_hook(lambda _module, _inputs, output: keys.append(output))
        try:
            out = self.tower(pixel_values.to(self.model.dtype), output_attentions=True, return_dict=True)
        finally:
            hook.remove()
        cues = {"image_features": self._tokens_of(out.last_hidden_state)}
        if "attention_scores" in wanted:
            received = out.attentions[-1].float().mean(dim=(1, 2))
            cues["attention_scores"] = self._tokens_of(received.unsqueeze(2)).mean(dim=2)
        if "vision_keys" in wanted:
            cues["vision_keys"] = self._tokens_of(keys[0])
        return cues

    def project(self, image_features: Tensor) -> Tensor:
        return self.model.model.connector.modality_projection(image_features)

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.model.get_image_features(pixel_values.unsqueeze(0), return_dict=True)
        return tokens.pooler_output[0].unsqueeze(0), torch.arange(patches.shape[1])

    def _tokens_of(self, patches: Tensor) -> Tensor:
        """transformers' own pixel shuffle of all tiles [V,n,C]: [1,P,factor²·C]."""
        connector = self.model.model.connector
        return connector.pixel_shuffle(patches, connector.scale_factor).flatten(0, 1).unsqueeze(0)
