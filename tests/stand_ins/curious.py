"""Pruners that read every cue there is: no method of the registry does, and each must be what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp.export.pruners import CUES, ops
from vtp.export.pruners.base import Pruner
from vtp.export.tower_cues import SCORES


def loudness(cues: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """A score [B,n] to which every cue adds: per-token ones by their means, text through a weighted sum."""
    total = torch.zeros(rows.shape[:2])
    for weight, name in enumerate((*SCORES, "next_scores"), 2):
        total = total + weight * cues.get(name, total * 0)
    for name in ("keys", "vision_keys", "hidden_states", "image_features"):
        if name in cues:
            total = total + cues[name].float().sin().mean(dim=2)
    if "image_embeds" in cues:  # of the whole picture, also where fewer tokens arrive
        whole = cues["image_embeds"].float().mean(dim=1, keepdim=True)
        total = total + torch.matmul(rows.float().sin(), whole.sin().transpose(1, 2)).squeeze(2)
    if "text_mask" in cues:
        weights = (0.25 + cues["text_mask"]).unsqueeze(1)
        asked = torch.matmul(weights, cues["text_embeds"].float())
        total = total + torch.matmul(rows.float().sin(), asked.sin().transpose(1, 2)).squeeze(2)
        if "text_attention" in cues:
            read = cues["text_attention"].mean(dim=1) * (2 + cues["text_gravity"].sin())
            total = total + torch.matmul(weights, read).squeeze(1)
    return total


class CuriousVision(Pruner):
    """Reads the tower."""

    name, site, needs = "curious-vision", "vision", CUES["vision"]

    def forward(self, **cues: Tensor) -> Tensor:
        return ops.raster(ops.top_k(loudness(cues, cues["image_features"]), self.keep))


class CuriousProjector(Pruner):
    """Reads the embeddings and the prompt, and keeps the places."""

    name, site, needs, positions = "curious-projector", "projector", CUES["projector"], "original"

    def forward(self, **cues: Tensor) -> Tensor:
        return ops.raster(ops.top_k(loudness(cues, cues["image_embeds"]), self.keep))


class CuriousDecoder(Pruner):
    """Prunes at three places of the decoder, with all that can be seen there."""

    name, site, needs = "curious-decoder", "decoder", CUES["decoder"]

    @classmethod
    def sites(
        cls, layers: int, count: int, keep: int, settings: Mapping[str, Any]
    ) -> tuple[tuple[int, int], ...]:
        return ((1, max(keep, count * 3 // 4)), (2, max(keep, count // 2)), (layers - 1, keep))

    def forward(self, **cues: Tensor) -> Tensor:
        return ops.raster(ops.top_k(loudness(cues, cues["hidden_states"]), self.keep))


class Blurring(Pruner):
    """Merges: a kept row is the mean of itself and its right neighbour."""

    name, site, needs, merges = "blurring", "vision", ("image_features", "attention_scores"), True

    def forward(self, image_features: Tensor, attention_scores: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        keep = ops.raster(ops.top_k(attention_scores, self.keep))
        beside = (keep + 1).clamp(max=self.count - 1)
        rows = ops.gather_rows(image_features, keep) + ops.gather_rows(image_features, beside)
        return keep, rows / 2


class BlurringLate(Blurring):
    """The same at the projector, with the places kept."""

    name, site, positions = "blurring-late", "projector", "original"
    needs = ("image_embeds", "attention_scores")

    def forward(self, image_embeds: Tensor, attention_scores: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(image_embeds, attention_scores)
