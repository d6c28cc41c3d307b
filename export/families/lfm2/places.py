"""What SigLIP 2 learned of places, a square table, resampled to a picture's grid by constant weights.

Source: `resize_positional_embeddings` of transformers' modeling_siglip2.py, which is torch's bilinear
interpolation with antialiasing. That is linear in the table: every patch takes a few of its places, whichever
numbers they hold, so that the table stays one weight of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def resampling(side: int, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Taps int64 [P,t] and weights float32 [P,t] of the P patches of grids, one grid after another, in a
    table of side x side places.

    A patch that takes fewer than t of them takes place 0 with weight 0 besides.
    """
    each = [_resampling(side, grid) for grid in grids]
    most = max(taps.shape[1] for taps, _ in each)
    taps, weights = zip(*each, strict=True)
    return _joined(taps, most), _joined(weights, most)


def _joined(tables: Iterable[Tensor], width: int) -> Tensor:
    """Tables [.,t] one after another, filled up with zeros to [.,width]."""
    return torch.cat([functional.pad(table, (0, width - table.shape[1])) for table in tables])


def _resampling(side: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The same of one grid."""
    rows, columns = (_along(side, length) for length in grid)  # [h,side], [w,side]
    weights = torch.einsum("ha,wb->hwab", rows, columns).reshape(grid[0] * grid[1], side * side)
    most = int((weights != 0).sum(dim=1).max())
    taps = (weights != 0).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    taken = weights.gather(1, taps)
    return torch.where(taken != 0, taps, 0), taken


def _along(side: int, length: int) -> Tensor:
    """[length, side]: how much of each place along an edge every patch takes."""
    every = torch.eye(side).view(side, 1, 1, side)  # a picture for each place; torch 2.13 errs on columns
    return functional.interpolate(every, (1, length), mode="bilinear", antialias=True)[:, 0, 0].T
