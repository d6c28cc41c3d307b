"""HoloV (arXiv 2510.02912): a quota of tokens for every part of the picture, the most attended in each.

Site: projector. Inputs: image_embeds [B,N,D]; attention_scores [B,N], the mean over heads of the CLS query's
row (or of the attention received, in towers without CLS). Options: crops (0: 1024·N / (576·K) rounded
down, 16 for 64 of 576), alpha (0.09), the weight of the variance. Default K: 64 of 576.

1. The tokens, in raster order, are cut into `crops` runs of equal length (the first ones one longer where
   that does not come out even).
2. In a crop, a token's variance is that of its cosines with the crop's tokens, its own taken as 0; the
   divisor is the length less one. Variances are scaled to the crop's mean attention. The crop's score
   is the mean over its tokens of 1000 · attention + alpha · scaled variance.
3. A crop's quota is K times its share of all scores, rounded down; the crops with the largest shares get one
   more each until K are dealt. A crop keeps the tokens with the highest attention, as many as its quota.

After the scaling, the mean variance of a crop is its mean attention: quotas follow attention but for the
1e-6 that guard the division. That is what the published code does, and it is kept.

Departures from the published code: where a quota exceeds its crop, the code fills up with zero vectors;
here the most attended of the tokens left take those places. Shares are rounded to about 2**-17 of the mean
share, so that equal crops tie and an engine's rounding decides nothing. A crop of one token is scored like
any other (variance 0), not by unscaled attention. The number of crops follows the code for Qwen2.5-VL;
the one for LLaVA fixes 16 beside K = 64, which is the same. Everything is float32 whatever the model's
dtype.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner

GUARD = 1e-6  # the code's guard of every division
GRAIN = 17  # shares are rounded to 2**-17 of a power of two near the mean share


class HoloV(Pruner):
    """Keeps the most attended tokens of every crop, as many as the crop's score earns."""

    name = "holov"
    site = "projector"
    needs = ("image_embeds", "attention_scores")
    options: ClassVar[dict[str, Any]] = {"crops": 0, "alpha": 0.09}
    paper = "arXiv 2510.02912"

    places: Tensor
    real: Tensor
    back: Tensor
    others: Tensor

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        crops, alpha = self.settings["crops"], self.settings["alpha"]
        if not 0 <= crops <= self.count:
            raise UsageError(f"method holov: crops {crops} is outside 0 (by K) to {self.count}, the tokens")
        if not 0 <= alpha <= 100:
            raise UsageError(f"method holov: alpha {alpha} is outside 0 to 100, the weight of the variance")
        self.crops = crops or min(max(1, 1024 * self.count // (576 * keep)), self.count)
        self.grain = 2.0 ** (math.floor(math.log2(keep / self.crops)) - GRAIN)
        sizes = crop_sizes(self.count, self.crops)
        self.longest = sizes[0]
        places, back = layout(sizes)
        self.register_buffer("places", places)
        self.register_buffer("back", back)
        self.register_buffer("real", (torch.arange(self.longest) < torch.tensor(sizes).unsqueeze(1)).float())
        self.register_buffer("others", 1 - torch.eye(self.longest))

    def forward(self, image_embeds: Tensor, attention_scores: Tensor) -> Tensor:  # type: ignore[override]
        """image_embeds [B,N,D], attention_scores [B,N] -> keep_indices [B,K]."""
        scores = attention_scores.float()
        attention = scores.index_select(1, self.places).reshape(-1, self.crops, self.longest)
        quota = self.quotas(self.crop_scores(image_embeds, attention * self.real))
        first = self.first_of_crops(attention.masked_fill(self.real == 0, -torch.inf), quota)
        chosen = first.reshape(-1, self.crops * self.longest).index_select(1, self.back) > 0
        return ops.raster(ops.top_k(scores.masked_fill(chosen, torch.inf), self.keep))

    def crop_scores(self, image_embeds: Tensor, attention: Tensor) -> Tensor:
        """Scores [B,P] of the crops from rows [B,N,D] and attention [B,P,S], 0 where a crop is shorter."""
        rows = image_embeds.float()
        rows = rows / (rows.norm(dim=2, keepdim=True) + GUARD)
        rows = rows.index_select(1, self.places).reshape(-1, self.crops, self.longest, rows.shape[2])
        rows = rows * self.real.unsqueeze(2)
        sizes = self.real.sum(dim=1)
        divisor = (sizes - 1).clamp_min(1).unsqueeze(1)
        likeness = torch.matmul(rows, rows.transpose(2, 3)) * self.others
        mean = likeness.sum(dim=3) / divisor
        away = (likeness - mean.unsqueeze(3)) * self.real.unsqueeze(1)
        variance = (away * away).sum(dim=3) / divisor * self.real
        attended, spread = 1000 * attention.sum(dim=2) / sizes, variance.sum(dim=2) / sizes
        return attended + self.settings["alpha"] * spread * (attended / (spread + GUARD))

    def quotas(self, scores: Tensor) -> Tensor:
        """Tokens that crops may keep, float32 [B,P] of whole numbers, from their scores [B,P]."""
        share = scores / (scores.sum(dim=1, keepdim=True) + GUARD) * self.keep
        share = torch.floor(share / self.grain + 0.5) * self.grain
        quota = torch.floor(share)
        left = self.keep - quota.sum(dim=1, keepdim=True)
        one_more = (torch.arange(self.crops) < left).float()
        return quota + torch.zeros_like(quota).scatter(1, ops.top_k(share, self.crops), one_more)

    def first_of_crops(self, attention: Tensor, quota: Tensor) -> Tensor:
        """1 for the `quota` [B,P] most attended tokens of each crop, else 0: [B,P,S]."""
        ranked = ops.top_k(attention, self.longest)
        within = (torch.arange(self.longest) < quota.unsqueeze(2)).float()
        return torch.zeros_like(within).scatter(2, ranked, within)


def crop_sizes(count: int, crops: int) -> list[int]:
    """Lengths of the runs, longer ones first."""
    return [count // crops + (place < count % crops) for place in range(crops)]


def layout(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Places int64 [P·S] of the tokens of each crop, its first one repeated where it is shorter than S.

    And, the other way, where each of the N tokens lies among those P·S.
    """
    places, back, start = [], [], 0
    for crop, size in enumerate(sizes):
        run = list(range(start, start + size))
        places += run + [start] * (sizes[0] - size)
        back += [crop * sizes[0] + step for step in range(size)]
        start += size
    return torch.tensor(places), torch.tensor(back)
