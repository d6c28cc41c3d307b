"""Evenly spaced places: the baseline that ignores the picture but covers it.

Site: vision. Input: image_features [B,N,C], read for its batch size only. Default K: 64 of 576 tokens.

The rule, for K places on a grid of H rows and W columns:
1. R rows are used, R = round(sqrt(K·H / W)) (so that cells come out square), at least ceil(K / W)
   and at most min(H, K). Half rounds up.
2. K is dealt to the R rows as evenly as it goes: row i gets floor((i+1)·K / R) - floor(i·K / R) = n places.
3. Row i lies at floor((i + 1/2)·H / R), its place j at column floor((j + 1/2)·W / n).
Because R <= H and n <= W, the K places are distinct. 64 of 24x24 is the 8x8 lattice of step 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vtp.export.pruners.base import Pruner


class Uniform(Pruner):
    """Keeps the centres of K nearly square cells."""

    name = "uniform"
    site = "vision"
    needs = ("image_features",)

    chosen: Tensor

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        self.register_buffer("chosen", torch.tensor([spread(grid, keep)], dtype=torch.int64))

    def forward(self, image_features: Tensor) -> Tensor:  # type: ignore[override]
        """image_features [B,N,C] -> keep_indices [B,K], the same for every row."""
        return self.chosen.expand(image_features.shape[0], -1)


def spread(grid: tuple[int, int], keep: int) -> list[int]:
    """The raster indices of `keep` evenly spaced places of `grid` (rows, columns), ascending."""
    height, width = grid
    wanted = math.floor(math.sqrt(keep * height / width) + 0.5)
    rows = min(max(wanted, -(-keep // width)), height, keep)
    places = []
    for row in range(rows):
        y = centre(row, rows, height)
        count = (row + 1) * keep // rows - row * keep // rows
        places += [y * width + centre(column, count, width) for column in range(count)]
    return places


def centre(cell: int, cells: int, length: int) -> int:
    """The middle place of `cell` when `length` places are cut into `cells` equal cells."""
    return (2 * cell + 1) * length // (2 * cells)
