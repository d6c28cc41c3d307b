"""FastV (arXiv 2403.06764): keep what the last prompt token looks at after two decoder layers.

Site: decoder:2 (between layers 1 and 2; the paper's K = 2). Input: attention_scores [B,N], the mean
over heads of the last prompt token's row in layer 1, cut to the image. Default: half of the tokens
(the paper's R = 50 %).

Selection is the top K of the scores; kept tokens keep their original positions. Departures from the
published code: equal scores go to the lower index, and the keep-count is given directly instead of as
a ratio. The paper's "mask instead of drop" mode is not offered: it saves nothing.
"""

from __future__ import annotations

from torch import Tensor

from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner


class FastV(Pruner):
    """Keeps the K tokens with the highest attention from the last prompt token."""

    name = "fastv"
    site = "decoder:2"
    needs = ("attention_scores",)
    paper = "arXiv 2403.06764"

    @classmethod
    def default_keep(cls, count: int) -> int:
        """Half of the N = `count` tokens, as in the paper."""
        return max(1, count // 2)

    def forward(self, attention_scores: Tensor) -> Tensor:  # type: ignore[override]
        """attention_scores [B,N] -> keep_indices [B,K]."""
        return ops.raster(ops.top_k(attention_scores.float(), self.keep))
