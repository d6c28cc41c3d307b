"""VisionZip (arXiv 2412.04467): attended tokens as they are, and a few that summarise all the others.

Site: vision; merges. Inputs: image_features [B,N,C], before the projector and without CLS; attention_scores
[B,N], the mean over heads of the CLS query's row (or of the attention received, in towers without CLS);
vision_keys [B,N,C], the keys of the layer that makes the features, heads side by side. Options:
contextual (10/64), the share of tokens that summarise; heads, the tower's (0: what towers of that width
have, see `usual_heads`). Default K: 64 of 576, 54 dominant and 10 contextual ones.

1. The dominant tokens are those with the highest attention. They are passed on as they are.
2. Of the tokens left, in raster order, every R // T-th is a target, T in all: the contextual tokens.
3. Each other token joins the target that it is most like, by the cosine of their keys, averaged over heads.
4. A target's row is its own features plus the mean of those that joined it: about twice as long as a
   dominant one where many did. That is what the published code does, and it is kept.

keep_indices are the places of dominant tokens and of targets.

Departures from the published code: it passes CLS on as one of its dominant tokens (53 patches, CLS and 10
contextual tokens for 64); a visual token here is a patch, so that all of the K are, and a 54th takes the
place of CLS. It passes dominant tokens on first, then contextual ones; here all are in raster order. K below
7 leaves no contextual token at the default share, where the code would divide by zero. Attention is the mean
over heads where the code takes the sum. A zero key is like nothing instead of NaN. Cosines and means are
float32 whatever the model's dtype, and ties go to the lower place.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import merge, ops
from vtp.export.pruners.base import Pruner


class VisionZip(Pruner):
    """Keeps K - T attended tokens and T evenly spaced ones, into which all the rest is averaged."""

    name = "visionzip"
    site = "vision"
    needs = ("image_features", "attention_scores", "vision_keys")
    options: ClassVar[dict[str, Any]] = {"contextual": 0.15625, "heads": 0}
    merges = True
    paper = "arXiv 2412.04467"

    target: Tensor
    other: Tensor

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        share, heads = self.settings["contextual"], self.settings["heads"]
        if not 0 <= share < 1:
            raise UsageError(
                f"method visionzip: contextual {share} is outside 0 to below 1, the share of merged tokens"
            )
        if heads < 0:
            raise UsageError(f"method visionzip: heads {heads} is negative; choose 0 (by width) or more")
        self.contextual = int(keep * share)
        self.dominant = keep - self.contextual
        left = self.count - self.dominant
        target = spaced(left, self.contextual)
        other = sorted(set(range(left)) - set(target))
        self.register_buffer("target", torch.tensor(target, dtype=torch.int64))
        self.register_buffer("other", torch.tensor(other, dtype=torch.int64))

    def forward(  # type: ignore[override]
        self, image_features: Tensor, attention_scores: Tensor, vision_keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """image_features, vision_keys [B,N,C], attention_scores [B,N] -> keep_indices [B,K], rows [B,K,C]."""
        dominant = ops.top_k(attention_scores.float(), self.dominant)
        if self.contextual == 0:
            keep = ops.raster(dominant)
            return keep, ops.gather_rows(image_features, keep)
        left = merge.places_left(dominant, self.count)
        target = left.index_select(1, self.target)
        rows = ops.gather_rows(image_features, target).float()
        if len(self.other):
            other = left.index_select(1, self.other)
            keys = self.mean_keys(vision_keys)
            assigned = merge.likest(ops.gather_rows(keys, other), ops.gather_rows(keys, target))
            rows = rows + merge.means(assigned, ops.gather_rows(image_features, other))
        kept = ops.gather_rows(image_features, dominant)
        rows = torch.cat([kept, rows.to(image_features.dtype)], dim=1)
        return merge.in_raster_order(torch.cat([dominant, target], dim=1), rows)

    def mean_keys(self, vision_keys: Tensor) -> Tensor:
        """Keys [B,N,C] averaged over heads and normalised, float32 [B,N,C/heads]."""
        width = vision_keys.shape[2]
        heads = self.settings["heads"] or usual_heads(width)
        if width % heads:
            raise UsageError(f"method visionzip: heads {heads} does not divide the tower's width {width}")
        split = vision_keys.float().reshape(-1, self.count, heads, width // heads)
        return ops.normalize(split.sum(dim=2))  # a sum has the direction of the mean


def usual_heads(width: int) -> int:
    """Heads of a tower of `width` columns: 16 from 1024 on, as in CLIP's and SigLIP's, else 64 columns each.

    One head where that does not come out even. A cue of keys does not say how many heads made it.
    """
    heads = 16 if width >= 1024 else max(1, width // 64)
    return heads if width % heads == 0 else 1


def spaced(count: int, wanted: int) -> list[int]:
    """`wanted` places of `count`, every (count // wanted)-th from the first one on."""
    return [place * (count // wanted) for place in range(wanted)]
