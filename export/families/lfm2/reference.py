"""Where the reference cuts LFM2-VL: patches of views, an unshuffle in front of the projector, states."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtp.export.families.tiled.reference import ShuffledReference, ViewsReference


class Lfm2Reference(ViewsReference, ShuffledReference):
    """A tower without CLS."""

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

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        rows, grids = zip(*self._views(pixel_values), strict=True)
        padded = pad_sequence(list(rows), batch_first=True).to(self.model.dtype)
        seen = pad_sequence([torch.ones(len(own), dtype=torch.int64) for own in rows], batch_first=True)
        answer = self.model.model.get_image_features(padded, torch.tensor(grids), seen, return_dict=True)
        return torch.cat(answer.pooler_output).unsqueeze(0), torch.arange(patches.shape[1])

    def _seen(self, rows: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        return ShuffledReference.vision(self, rows.unsqueeze(0), wanted)

    def _view(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        attentions = [one.self_attn for one in self.blocks]
        shape = {
            "spatial_shapes": torch.tensor([self._grid()]),
            "pixel_attention_mask": torch.ones(pixel_values.shape[:2], dtype=torch.int64),
        }
        out, seen = self._watched(attentions, attentions[-1].k_proj, wanted, pixel_values, **shape)
        return {"states": out.last_hidden_state, **seen}

    def _shuffle(self, patches: Tensor) -> Tensor:
        grid = patches.reshape(1, *self._grid(), patches.shape[2])
        return self.model.model.multi_modal_projector.pixel_unshuffle(grid).flatten(0, 2)
