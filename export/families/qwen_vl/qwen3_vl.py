"""Qwen3-VL: Qwen2-VL's grid of patches, with features of several tower blocks added in the decoder.

Source: transformers' modeling_qwen3_vl.py (DeepStack: Meng et al., arXiv 2406.04334). After each of the first
L decoder layers, what a merger of its own made of an earlier tower block is added to the visual tokens. These
L deepstack features travel beside image_features and embeddings, so that whatever picks tokens picks them
too; methods see the first part alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from vtp.export.families.qwen_vl.qwen2_vl import Qwen2VL
from vtp.export.families.qwen_vl.reference import DeepReference, MergedReference
from vtp.export.families.qwen_vl.tower import DeepProjector, JoinedNorm, PlaceTable, TowerParts
from vtp.export.graphs.decoder import Decoder


class Qwen3VL(Qwen2VL):
    """Qwen3VLForConditionalGeneration."""

    name = "qwen3_vl"
    architectures = ("Qwen3VLForConditionalGeneration",)
    limits = (
        f"{Qwen2VL.limits}; methods see features and embeddings of the last tower block alone, and kept "
        "tokens take those of the other blocks along"
    )
    reference: ClassVar[type[MergedReference]] = DeepReference

    @property
    def decoder(self) -> Decoder:
        text, head = self.model.model.language_model, self.model.lm_head
        return Decoder(text, head, axes=3, deepstack=len(self._deep()))

    def projector(self, whole: bool) -> nn.Module:
        del whole  # it has no tokens but its patches
        return DeepProjector([self.tower.merger, *self._deep().values()])

    def tower_parts(self) -> TowerParts:
        return TowerParts(
            self.tower.merger.norm,
            places=self._places(),
            deep={number: JoinedNorm(merger.norm) for number, merger in self._deep().items()},
        )

    def _deep(self) -> dict[int, Any]:
        """Block number -> merger of the features that the decoder takes besides, block after block."""
        numbers, mergers = self.tower.deepstack_visual_indexes, self.tower.deepstack_merger_list
        pairs = zip(numbers, mergers, strict=True)
        return dict(sorted(pairs, key=lambda pair: pair[0]))

    def _places(self) -> PlaceTable:
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        tower, picture = self.tower, self.picture
        taps, weights = get_vision_interpolation_indices_and_weights(
            torch.tensor([[1, picture.rows, picture.columns]]),
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=picture.merge,
        )
        return PlaceTable(tower.pos_embed, taps, weights)


FAMILY = Qwen3VL
