"""EVS (arXiv 2510.14624): of a clip the tokens that changed most since the frame before, over all frames.

Site: projector, of families with videos (`--frames`). Input: image_embeds [B,P,D], the T·h·w patches of the
frames in their order. Default K: half of the tokens. Kept tokens keep their places.

1. A patch's dissimilarity is 1 - cosine of its embedding to that of the same cell of the frame before.
2. The first frame is kept whole.
3. Of all later patches of the clip the K - h·w largest stay; equal ones in the order of the clip.

vLLM's form, whose K is max(h·w, floor(T·h·w·(1 - q))) for a pruning rate q; here K is given, and one below
h·w is refused. A zero embedding is at dissimilarity 1 from everything, as there. Cosines are float32 whatever
the model's dtype, and exactly 1 for equal rows, so that in a still clip ties decide and not rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner


class Evs(Pruner):
    """Keeps the first frame, and of the others the K - h·w patches that changed most."""

    name = "evs"
    site = "projector"
    needs = ("image_embeds",)
    reads_frames = True
    positions = "original"
    paper = "arXiv 2510.14624"

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        self.cells = grid[1]
        if keep < self.cells:
            raise UsageError(
                f"keep-tokens {keep} is below the {self.cells} patches of the first frame, which method evs "
                f"keeps whole; choose {self.cells} to {self.count}"
            )

    @classmethod
    def default_keep(cls, count: int) -> int:
        """Half of the tokens, a pruning rate of 0.5."""
        return max(1, count // 2)

    def forward(self, image_embeds: Tensor) -> Tensor:  # type: ignore[override]
        """image_embeds [B,P,D] -> keep_indices [B,K]."""
        first = torch.arange(self.cells).unsqueeze(0).expand(image_embeds.shape[0], -1)
        if self.keep == self.cells:
            return first
        unlike = 1 - ops.cosines(image_embeds[:, self.cells :], image_embeds[:, : -self.cells])
        changed = ops.top_k(unlike, self.keep - self.cells)
        return torch.cat([first, ops.raster(changed) + self.cells], dim=1)
