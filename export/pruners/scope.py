"""SCOPE (arXiv 2510.24214): salient tokens that together cover the picture.

Site: vision. Inputs: image_features [B,N,C], before the projector and without CLS; attention_scores
[B,N], the mean over heads of the CLS query's row (or of the attention received, in towers without CLS).
Option: alpha (1.0), the power of the attention. Default K: 64 of 576, as in the paper's tables.

A token is covered as far as its likest kept token is like it: the maximum of their cosines, at least 0.
K times the token is kept that has the largest product of
  - its gain, the sum over all tokens of the coverage it would add, and
  - its attention to the power of alpha.

Departures from the published code: attention is the mean over heads where the code takes the sum, which
scales all products alike; a zero feature row is similar to nothing instead of NaN; cosines and gains are
float32 whatever the model's dtype. Equal products go to the lower index.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import greedy, ops
from vtp.export.pruners.base import Pruner


class Scope(Pruner):
    """Keeps K tokens greedily by attention times the coverage they add."""

    name = "scope"
    site = "vision"
    needs = ("image_features", "attention_scores")
    options: ClassVar[dict[str, Any]] = {"alpha": 1.0}
    paper = "arXiv 2510.24214"

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        self.alpha = self.settings["alpha"]
        if not 0 <= self.alpha <= 8:
            raise UsageError(f"method scope: alpha {self.alpha} is outside 0 to 8, the attention's power")

    def forward(self, image_features: Tensor, attention_scores: Tensor) -> Tensor:  # type: ignore[override]
        """image_features [B,N,C], attention_scores [B,N] -> keep_indices [B,K]."""
        weights = attention_scores.float()
        if self.alpha != 1:
            weights = weights.pow(self.alpha)
        return ops.raster(greedy.cover(greedy.cosines(image_features), weights, self.keep))
