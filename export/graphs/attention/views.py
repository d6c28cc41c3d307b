"""Views of unlike sizes in a vision tower: rows one view after another, each view attending to itself alone.

Of a picture in tiles and as a whole of another shape, what works row by row (norms, products) takes all rows
at once; attention takes views of equally many rows together, as a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor


def apart(rows: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Heads [1,H,P,d] -> [v,H,n,d] for every v views of n rows in a row; as it is where no `lengths` are."""
    if not lengths:
        return [rows]
    heads, width = rows.shape[1], rows.shape[3]
    groups = [(length, len(list(views))) for length, views in groupby(lengths)]
    parts = rows[0].split([length * views for length, views in groups], dim=1)
    return [
        part.reshape(heads, views, length, width).transpose(0, 1)
        for part, (length, views) in zip(parts, groups, strict=True)
    ]


def together(parts: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """What `apart` gave -> [1,H,P,d]."""
    if not lengths:
        return parts[0]
    return torch.cat([part.transpose(0, 1).flatten(1, 2) for part in parts], dim=1).unsqueeze(0)


def in_order(parts: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """What was made of every view's rows, [v,n,...] -> [1,P,...]."""
    if not lengths:
        return parts[0]
    return torch.cat([part.flatten(0, 1) for part in parts]).unsqueeze(0)
