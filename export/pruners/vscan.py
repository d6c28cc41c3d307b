"""VScan, its encoder half (arXiv 2505.22654): a local scan, a global scan, and everything else merged in.

Site: projector; merges. Inputs: image_embeds [B,N,D]; early_scores and attention_scores [B,N], the mean over
heads of the CLS query's row (or of the attention received, in towers without CLS) in a block at a quarter of
the tower's depth and in the one that makes the features. Options: window (6), the side of a window of the
local scan; local (0.5), its share of K. Default K: 64 of 576.

1. Local: of every window of 6 × 6 tokens the floor(K·local) / (number of windows) ones with the highest early
   score are kept.
2. Global: the highest scores of the last block among the tokens left, until there are K.
3. Every other token is averaged into the kept one that it is most like by cosine: (kept + sum) / (1 + count).

keep_indices are the places of the kept tokens. Merging is behind the projector, as in the published code.

Departures from the published code: where the local share does not divide evenly, the global scan takes the
places left, and exactly K come out; the code emits fewer. Windows at the right and lower edges are cut short
where the grid is not a multiple of 6, and give at most what they hold; the code takes 24 × 24 tokens only.
Means and cosines are float32 whatever the model's dtype, and ties go to the lower place. The decoder half,
which drops tokens before layer 16 of 32, is `--then pyramiddrop`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import merge, ops
from vtp.export.pruners.base import Pruner


class VScan(Pruner):
    """Keeps what windows attended to early and what the last block attends to; the rest is averaged in."""

    name = "vscan"
    site = "projector"
    needs = ("image_embeds", "early_scores", "attention_scores")
    options: ClassVar[dict[str, Any]] = {"window": 6, "local": 0.5}
    merges = True
    reads_grid = True
    paper = "arXiv 2505.22654"

    places: Tensor
    real: Tensor
    back: Tensor

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        side, local = self.settings["window"], self.settings["local"]
        if side < 1:
            raise UsageError(f"method vscan: window {side} is below 1, the side of a window in tokens")
        if not 0 <= local <= 1:
            raise UsageError(f"method vscan: local {local} is outside 0 to 1, the share of the local scan")
        cut = windows(grid, side)
        self.windows, self.longest = len(cut), max(map(len, cut))
        self.each = int(keep * local) // self.windows
        padded = [window + [window[0]] * (self.longest - len(window)) for window in cut]
        places = torch.tensor(padded)
        real = torch.arange(self.longest) < torch.tensor([[len(window)] for window in cut])
        back = torch.empty(self.count, dtype=torch.int64)
        back[places[real]] = torch.arange(places.numel()).reshape(places.shape)[real]
        self.register_buffer("places", places.flatten())
        self.register_buffer("real", real)
        self.register_buffer("back", back)

    def forward(  # type: ignore[override]
        self, image_embeds: Tensor, early_scores: Tensor, attention_scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        """image_embeds [B,N,D], scores [B,N] -> keep_indices [B,K], rows [B,K,D]."""
        scores = attention_scores.float()
        if self.each:
            scores = scores.masked_fill(self.scanned(early_scores.float()), torch.inf)
        keep = ops.raster(ops.top_k(scores, self.keep))
        rows = ops.gather_rows(image_embeds, keep)
        if self.keep == self.count:
            return keep, rows
        rest = merge.places_left(keep, self.count)
        return keep, merge.averaged(rows, ops.gather_rows(image_embeds, rest))

    def scanned(self, scores: Tensor) -> Tensor:
        """Whether a token is among the highest of its window by scores [B,N]: bool [B,N]."""
        cut = scores.index_select(1, self.places).reshape(-1, self.windows, self.longest)
        ranked = ops.top_k(cut.masked_fill(~self.real, -torch.inf), min(self.each, self.longest))
        chosen = torch.zeros_like(cut).scatter(2, ranked, torch.ones_like(ranked, dtype=cut.dtype))
        return chosen.reshape(-1, self.windows * self.longest).index_select(1, self.back) > 0


def windows(grid: tuple[int, int], side: int) -> list[list[int]]:
    """The places of every window of `side` x `side` tokens, row by row."""
    height, width = grid
    return [
        [
            y * width + x
            for y in range(top, min(top + side, height))
            for x in range(left, min(left + side, width))
        ]
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
