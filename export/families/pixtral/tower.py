"""Pixtral's vision tower at one image size, and Mistral 3's merging of neighbouring patches.

Source: transformers' modeling_pixtral.py and modeling_mistral3.py. The tower's own layers are used as they
are; places and rotary angles, which transformers works out for every picture, are known at export.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtp.export.graphs.attention.operators import TowerProbe, active
from vtp.export.tower_cues import KEYS, by_block


@dataclass(frozen=True)
class Merging:
    """`rows` x `columns` patches, `edge` x `edge` of which make one visual token."""

    rows: int
    columns: int
    edge: int

    def side_by_side(self, patches: Tensor) -> Tensor:
        """[B,P,C] -> [B,N,C·edge²], channel by channel, as `unfold` lays them out."""
        batch, _, width = patches.shape
        high, wide, edge = self.rows // self.edge, self.columns // self.edge, self.edge
        parts = patches.reshape(batch, high, edge, wide, edge, width).permute(0, 1, 3, 5, 2, 4)
        return parts.reshape(batch, high * wide, width * edge * edge)

    def mean(self, patches: Tensor) -> Tensor:
        """[B,P] -> [B,N]."""
        return self.side_by_side(patches.unsqueeze(2)).mean(dim=2)


class PixtralTower(nn.Module):
    """pixel_values [B,3,H,W] -> image_features [B,N,C·edge²], then the cues asked for, in their order.

    A token's features are what enters the projector's merging layer: its patches, normed, side by side.
    Scores float32 [B,N] are means over them; vision_keys are the last layer's keys before they are turned.
    """

    numbers: Tensor

    def __init__(
        self, tower: Any, layers: Sequence[nn.Module], norm: nn.Module, merging: Merging, cues: Sequence[str]
    ) -> None:
        super().__init__()
        self.patch, self.first_norm, self.norm = tower.patch_conv, tower.ln_pre, norm
        self.rotary, self.layers = tower.patch_positional_embedding, nn.ModuleList(layers)
        self.merging, self.cues = merging, tuple(cues)
        self.reads = by_block(cues, len(self.layers))
        self.register_buffer("numbers", places(merging.rows, merging.columns), persistent=False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Features, then the cues asked for, in their order."""
        layers: list[Any] = list(self.layers)
        wanted = {
            layers[at].attention: [cue for cue in cues if cue != KEYS] for at, cues in self.reads.items()
        }
        probe = TowerProbe(False, wanted)
        hidden = self.first_norm(self.patch(pixel_values).flatten(2).transpose(1, 2))
        turns, keys = self.rotary(hidden, self.numbers), hidden
        with active(probe):
            for number, layer in enumerate(layers):
                if KEYS in self.reads.get(number, ()):
                    keys = layer.attention.k_proj(layer.attention_norm(hidden))
                hidden = layer(hidden, None, position_embeddings=turns)
        read = {name: self.merging.mean(scores) for name, scores in probe.read.items()}
        read[KEYS] = self.merging.side_by_side(keys)
        return (self.merging.side_by_side(self.norm(hidden)), *(read[cue] for cue in self.cues))


class MergingProjector(nn.Module):
    """image_features [B,M,C·edge²] -> image_embeds [B,M,D]: Mistral 3's projector behind its norm."""

    def __init__(self, projector: Any) -> None:
        super().__init__()
        self.merge, self.act = projector.patch_merger.merging_layer, projector.act
        self.linear_1, self.linear_2 = projector.linear_1, projector.linear_2

    def forward(self, image_features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(self.merge(image_features))))


def places(rows: int, columns: int) -> Tensor:
    """int64 [P,2]: row and column of every patch."""
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack(grid, dim=-1).reshape(-1, 2)
