"""Merging pieces that pruners share: pruned rows are poured into kept ones, as matrix products.

Everything is of static shape; an assignment is a matrix of weights [B,K,N], so that merging is one MatMul.
Sums are float32 whatever the model's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtp.export.pruners import ops


def places_left(chosen: Tensor, count: int) -> Tensor:
    """Of `count` places those that are not among chosen [B,k], which are unique: [B,count-k], ascending."""
    free = torch.ones(chosen.shape[0], count).scatter(
        1, chosen, torch.zeros_like(chosen, dtype=torch.float32)
    )
    return ops.top_k(free, count - chosen.shape[1])


def in_raster_order(indices: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sort indices [B,K] ascending and carry their rows [B,K,C] along."""
    ascending, order = torch.ops.vtp.top_k(indices.float(), indices.shape[-1], False)
    return ascending.to(torch.int64), ops.gather_rows(rows, order)


def likest(rows: Tensor, centres: Tensor) -> Tensor:
    """Which of T centres [B,T,C] each of rows [B,R,C] is most like: 1 there, else 0, float32 [B,T,R].

    Likeness is the scalar product: give normalised rows for cosines. Of equal centres the first takes it.
    """
    best = torch.matmul(rows, centres.transpose(1, 2)).argmax(dim=2)
    return (best.unsqueeze(1) == torch.arange(centres.shape[1]).unsqueeze(1)).float()


def nearest_others(rows: Tensor, chosen: Tensor, neighbours: int) -> Tensor:
    """The `neighbours` of rows [B,N,C] most like each chosen one [B,K], not itself: 1 there, else 0, [B,K,N].

    Likeness is the scalar product: give normalised rows for cosines. Ties go to the lower index.
    """
    likeness = torch.matmul(ops.gather_rows(rows, chosen), rows.transpose(1, 2))
    itself = chosen.unsqueeze(2) == torch.arange(rows.shape[1])
    near = ops.top_k(likeness.masked_fill(itself, -torch.inf), neighbours)
    return torch.zeros_like(likeness).scatter(2, near, torch.ones_like(near, dtype=torch.float32))


def weighted_sums(weights: Tensor, rows: Tensor) -> Tensor:
    """Sums float32 [B,K,C] of rows [B,N,C], each with its weight [B,K,N]."""
    return torch.matmul(weights, rows.float())


def means(assigned: Tensor, rows: Tensor) -> Tensor:
    """Mean float32 [B,T,C] of the rows [B,R,C] assigned (1 or 0, [B,T,R]) to each centre; 0 where none is."""
    return weighted_sums(assigned, rows) / assigned.sum(dim=2, keepdim=True).clamp_min(1)


def averaged(kept: Tensor, others: Tensor) -> Tensor:
    """Rows [B,K,C] kept, each the mean of itself and of the others [B,R,C] most like it by cosine.

    In the dtype of the kept rows. Of equal kept rows the first takes another in.
    """
    assigned = likest(ops.normalize(others), ops.normalize(kept))
    sums = kept.float() + weighted_sums(assigned, others)
    return (sums / (1 + assigned.sum(dim=2, keepdim=True))).to(kept.dtype)
