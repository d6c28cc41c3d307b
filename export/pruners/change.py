"""change: of a camera's picture the patches that changed most since a reference picture.

Site: vision. Inputs: picture and reference_picture [B,3,H,W], as the tower takes them. Default K: 64 of 576
tokens. Kept tokens keep their places. The idea is that of DTD (TimeChat-Online, arXiv 2504.17343), for
single pictures.

1. A patch's change is the mean absolute difference of its pixels from the reference's.
2. The K patches that changed most stay; equal ones in raster order.

The runtime holds the reference: with `stream_reuse` it is the picture asked about before. Where there is none
(the first picture, one that is asked about by itself, a batch) it is plain grey, the mean colour of the
model's preprocessing, so that the patches stay that differ most from it.
"""

from __future__ import annotations

from torch import Tensor

from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner


class Change(Pruner):
    """Keeps the K patches whose pixels differ most from the reference's."""

    name = "change"
    site = "vision"
    needs = ("picture", "reference_picture")
    reads_grid = True
    positions = "original"
    paper = "arXiv 2504.17343"

    def forward(self, picture: Tensor, reference_picture: Tensor) -> Tensor:  # type: ignore[override]
        """Two pictures [B,3,H,W] -> keep_indices [B,K]."""
        changed = (picture.float() - reference_picture.float()).abs().sum(dim=1)
        return ops.raster(ops.top_k(self.of_patches(changed), self.keep))

    def of_patches(self, values: Tensor) -> Tensor:
        """Sums over the pixels [B,H,W] of every patch, [B,N]; those beyond the last whole patch are left out.

        A sum instead of the mean: the order is the same, and nothing is rounded that a lattice holds exactly.
        """
        rows, columns = self.grid
        height, width = values.shape[1] // rows, values.shape[2] // columns
        whole = values[:, : rows * height, : columns * width]
        return whole.reshape(-1, rows, height, columns, width).sum(dim=(2, 4)).flatten(1)
