"""FasterVLM (arXiv 2412.01818v1): keep what the CLS token attends to.

Site: vision. Input: attention_scores [B,N], the mean over heads of the CLS query's row in the encoder layer
that produces the features (or of the attention received, in towers without CLS). Default K: 64 of 576.

The first version of VisPruner's paper: its important tokens without its diverse ones, VisPruner with
r = 1. Departures from the published code: equal scores go to the lower index; the projector runs on
the kept tokens only, which gives the same numbers.
"""

from __future__ import annotations

from torch import Tensor

from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner


class FasterVLM(Pruner):
    """Keeps the K tokens with the highest attention from the CLS token."""

    name = "fastervlm"
    site = "vision"
    needs = ("attention_scores",)
    paper = "arXiv 2412.01818v1"

    def forward(self, attention_scores: Tensor) -> Tensor:  # type: ignore[override]
        """attention_scores [B,N] -> keep_indices [B,K]."""
        return ops.raster(ops.top_k(attention_scores.float(), self.keep))
