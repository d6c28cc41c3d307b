"""DivPrune (arXiv 2503.02175): the most diverse tokens, by the greedy solution of the max-min problem.

Site: projector. Input: image_embeds [B,N,D]. Default K: 64 of 576 tokens (the paper prunes to about
a tenth).

With 1 - cosine as the distance: the first token is the one whose nearest other token is farthest;
then, until there are K, the token whose nearest kept token is farthest. Attention and prompt play no part.

Written from descriptions of the paper's algorithm, for the licence of the published code forbids reuse;
agreement with that code was not tested. Stated here because they leave it open: equal distances go to the
lower index, a zero row is at distance 1 from everything, cosines are float32 whatever the model's dtype.
"""

from __future__ import annotations

from torch import Tensor

from vtp.export.pruners import greedy, ops
from vtp.export.pruners.base import Pruner


class DivPrune(Pruner):
    """Keeps K tokens such that the least distance between two of them is as large as greed gets it."""

    name = "divprune"
    site = "projector"
    needs = ("image_embeds",)
    paper = "arXiv 2503.02175"

    def forward(self, image_embeds: Tensor) -> Tensor:  # type: ignore[override]
        """image_embeds [B,N,D] -> keep_indices [B,K]."""
        return ops.raster(greedy.farthest(greedy.cosines(image_embeds), self.keep))
