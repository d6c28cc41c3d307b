"""Where the reference cuts LFM2-VL: patches of a grid, an unshuffle in front of the projector, states."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from vtp.export.families.tiled.reference import ShuffledReference


class Lfm2Reference(ShuffledReference):
    """pixel_values are the patches [P,values] of one picture; the tower has no CLS."""

    has_cls = False

    @property
    def blocks(self) -> list[Any]:
        return list(self.tower.encoder.layers)

    @property
    def norm(self) -> Any:
        return self.text.embedding_norm

    def entering(self, layer: Any) -> Any:
        return layer.operator_norm

    def project(self, image_features: Tensor) -> Tensor:
        projector = self.model.model.multi_modal_projector
        rows = projector.layer_norm(image_features) if projector.use_layer_norm else image_features
        return projector.linear_2(projector.act(projector.linear_1(rows)))

    def vision(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        return super().vision(pixel_values.unsqueeze(0), wanted)

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        return super().tokens(pixel_values.unsqueeze(0), patches)

    def _view(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        attentions = [one.self_attn for one in self.blocks]
        out, seen = self._watched(attentions, attentions[-1].k_proj, wanted, pixel_values, **self._shape())
        return {"states": out.last_hidden_state, **seen}

    def _features(self, pixel_values: Tensor) -> Tensor:
        pixels = pixel_values.to(self.model.dtype)
        return self.model.model.get_image_features(pixels, **self._shape(), return_dict=True).pooler_output[0]

    def _shape(self) -> dict[str, Tensor]:
        """What transformers is told of the grid of patches."""
        assert self.image_size is not None  # bundles of this family always have one
        sides = [edge // self.model.config.vision_config.patch_size for edge in self.image_size]
        return {
            "spatial_shapes": torch.tensor([sides]),
            "pixel_attention_mask": torch.ones(1, sides[0] * sides[1], dtype=torch.int64),
        }

    def _shuffle(self, patches: Tensor) -> Tensor:
        rows, columns = self._shape()["spatial_shapes"][0].tolist()
        grid = patches.reshape(1, rows, columns, -1)
        return self.model.model.multi_modal_projector.pixel_unshuffle(grid).flatten(0, 2)
