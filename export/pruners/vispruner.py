"""VisPruner (arXiv 2412.01818): important tokens by CLS attention, diverse ones by bipartite matching.

Site: vision. Inputs: image_features [B,N,C], before the projector and without CLS; attention_scores
[B,N], the mean over heads of the CLS query's row (or of the attention received, in towers without CLS).
Option: r (0.5), the share of important tokens. Default K: 64 of 576, as in the paper's tables.

1. floor(K·r) tokens with the highest attention are important; the residual keeps attention order.
2. While the residual is too long: its even places A are compared with its odd places B by cosine, and
   the (at most 8) members of A that are most like some member of B are dropped. What stays is A's
   survivors, most similar first, then B.

Every length is known at export, so the rounds are unrolled: one Gram matrix, whose rows each round gathers.
Departures from the published code, which selects the same set wherever it runs: it fails when the
residual is odd or a round wants to drop more than A has; here A is then one longer than B, and a round
drops at most half of the residual. Similarities are float32 whatever the model's dtype, a zero feature
row is similar to nothing instead of NaN, and ties go to the lower place.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner

DROP = 8  # tokens dropped in a round, from the published code


class VisPruner(Pruner):
    """Keeps floor(K·r) attended tokens and K - floor(K·r) tokens unlike each other."""

    name = "vispruner"
    site = "vision"
    needs = ("image_features", "attention_scores")
    options: ClassVar[dict[str, Any]] = {"r": 0.5}
    paper = "arXiv 2412.01818"

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        share = self.settings["r"]
        if not 0 <= share <= 1:
            raise UsageError(f"method vispruner: r {share} is outside 0 to 1, the share of important tokens")
        self.important = int(keep * share)
        self.diverse = keep - self.important

    def forward(self, image_features: Tensor, attention_scores: Tensor) -> Tensor:  # type: ignore[override]
        """image_features [B,N,C], attention_scores [B,N] -> keep_indices [B,K]."""
        scores = attention_scores.float()
        if self.diverse == 0:
            return ops.raster(ops.top_k(scores, self.keep))
        order = ops.top_k(scores, self.count)
        residual = order[:, self.important :]
        rows = ops.normalize(ops.gather_rows(image_features, residual))
        spread = torch.gather(residual, 1, distinct(rows, self.diverse))
        return ops.raster(torch.cat([order[:, : self.important], spread], dim=1))


def distinct(rows: Tensor, keep: int) -> Tensor:
    """Which `keep` of the unit rows [B,R,C] survive the rounds: their row numbers [B,keep].

    A round gathers whole rows of the Gram matrix and hides all columns but B's with -inf: copying rows
    and masking is several times quicker than gathering the block A x B number by number.
    """
    batch, count, _ = rows.shape
    products = torch.matmul(rows, rows.transpose(1, 2))
    hidden = torch.full((1, count), -torch.inf).expand(batch, count)
    shown = torch.zeros(1, (count + 1) // 2).expand(batch, -1)
    left = torch.arange(count).unsqueeze(0).expand(batch, count)
    while left.shape[1] > keep:
        drop = min(DROP, left.shape[1] - keep, left.shape[1] // 2)
        even, odd = left[:, 0::2], left[:, 1::2]
        mask = hidden.scatter(1, odd, shown[:, : odd.shape[1]]).unsqueeze(1)
        likeness = (ops.gather_rows(products, even) + mask).amax(dim=2)
        order = ops.top_k(likeness, even.shape[1])[:, drop:]
        left = torch.cat([even.gather(1, order), odd], dim=1)
    return left
