"""HiPrune (arXiv 2508.00553): what the tower's middle looks at, with its neighbours, then what its end does.

Site: vision. Inputs: middle_received and received_scores [B,N], the attention that patches receive, mean over
heads and all rows, in a block at three eighths of the tower's depth and in the one that makes the features.
Option: alpha (0.1), the share of K for anchors and their neighbours. Default K: 64 of 576.

1. Anchors: the round(K·alpha / 5) tokens that receive most attention in the middle.
2. Buffers: their neighbours above, below, left and right in the picture.
3. Registers: of the tokens left, those that receive most attention at the end, until there are K.

Departures from the published code, which selects the same set where no anchor lies at the picture's edge:
there it takes the places before and after an anchor in raster order, so that the "neighbour" of a token at
the left is the last one of the row above, and the neighbour above the first row is place 0. Here a token at
the edge has fewer neighbours. Its middle block is the ninth of LLaVA's 24 and the sixteenth of Qwen2.5-VL's
32; here the depth is one for all, which is the ninth of LLaVA's. Where anchors and buffers alone are more
than K (alpha near 1), the code fails; here anchors come first, then buffers in raster order. Ties go to the
lower place.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vtp.engines.errors import UsageError
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner

CROSS = 5  # an anchor and its four neighbours
NEAR = 1e30  # above every attention, below an anchor


class HiPrune(Pruner):
    """Keeps anchors of the middle block, the tokens around them, and what the last block attends to."""

    name = "hiprune"
    site = "vision"
    needs = ("middle_received", "received_scores")
    options: ClassVar[dict[str, Any]] = {"alpha": 0.1}
    reads_grid = True
    paper = "arXiv 2508.00553"

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        alpha = self.settings["alpha"]
        if not 0 <= alpha <= 1:
            raise UsageError(f"method hiprune: alpha {alpha} is outside 0 to 1, the share of anchors")
        self.anchors = round(keep * alpha / CROSS)

    def forward(self, middle_received: Tensor, received_scores: Tensor) -> Tensor:  # type: ignore[override]
        """middle_received, received_scores [B,N] -> keep_indices [B,K]."""
        scores = received_scores.float()
        if self.anchors:
            chosen = ops.top_k(middle_received.float(), self.anchors)
            anchor = torch.zeros_like(scores).scatter(1, chosen, torch.ones_like(chosen, dtype=scores.dtype))
            scores = torch.where(self.around(anchor) > 0, NEAR, scores)
            scores = torch.where(anchor > 0, torch.inf, scores)
        return ops.raster(ops.top_k(scores, self.keep))

    def around(self, anchor: Tensor) -> Tensor:
        """How many anchors (1 or 0, [B,N]) lie above, below, left and right of each token, [B,N]."""
        height, width = self.grid
        wider = functional.pad(anchor.reshape(-1, height, width), (1, 1, 1, 1))
        upright = wider[:, :height, 1:-1] + wider[:, 2:, 1:-1]
        level = wider[:, 1:-1, :width] + wider[:, 1:-1, 2:]
        return (upright + level).reshape(-1, height * width)
