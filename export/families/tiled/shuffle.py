"""Pixel shuffle: factor x factor neighbouring patches of a view become one visual token.

Source: `pixel_shuffle` of transformers' modeling_internvl.py and modeling_idefics3.py and `pixel_unshuffle`
of modeling_lfm2_vl.py, which agree: the channels of a token are its patches' side by side, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from vtp.export.tower_cues import SCORES


def shuffled_views(rows: Tensor, factor: int, grids: Sequence[tuple[int, int]]) -> Tensor:
    """[1,n,C] of views one after another, each with its (rows, columns) of patches -> [1,m,factor²·C]."""
    alike = [(grid, len(list(views))) for grid, views in groupby(grids)]
    lengths = [high * wide * views for (high, wide), views in alike]
    given = rows[0].split(lengths) if len(alike) > 1 else [rows[0]]
    parts = [
        pixel_shuffle(part.reshape(views, high * wide, -1), factor, wide).flatten(0, 1)
        for part, ((high, wide), views) in zip(given, alike, strict=True)
    ]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).unsqueeze(0)


def pixel_shuffle(rows: Tensor, factor: int, columns: int | None = None) -> Tensor:
    """[V,n,C] of views with `columns` patches in a row (None: square ones) -> [V,n/factor²,factor²·C]."""
    views, count, width = rows.shape
    wide = (columns or int(count**0.5)) // factor
    high = count // factor**2 // wide
    blocks = rows.reshape(views, high, factor, wide, factor, width).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(views, high * wide, factor * factor * width)


class ShuffledEncoder(nn.Module):
    """pixel_values -> image_features [B,P,factor²·C] and the cues asked for, of tokens instead of patches.

    encoder   gives image_features [V,n,C] and cues of n patches a view
    one_view  True: V is a batch of pictures. False: V views are the parts of one picture, whose tokens follow
              one another.
    grids     (rows, columns) of patches of every view of one picture, where `encoder` gives them one after
              another, [1,n,C]; empty: square views
    A token's scores are the mean of its patches', its vision_keys theirs side by side.
    """

    def __init__(
        self,
        encoder: nn.Module,
        cues: Sequence[str],
        factor: int,
        one_view: bool,
        grids: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        self.encoder, self.grids = encoder, tuple(grids)
        self.cues, self.factor, self.one_view = cues, factor, one_view

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Features [V,P,factor²·C], and scores [V,P] or vision_keys, of the P tokens of each view [V,3,H,W].

        Without `one_view` the views follow one another in one row: [1,V·P,·].
        """
        features, *read = self.encoder(pixel_values)
        tokens = [self._tokens(features)]
        for name, cue in zip(self.cues, read, strict=True):
            if name in SCORES:
                tokens.append(self._tokens(cue.unsqueeze(2)).mean(dim=2))
            else:
                tokens.append(self._tokens(cue))
        return tuple(tokens) if self.one_view else tuple(item.flatten(0, 1).unsqueeze(0) for item in tokens)

    def _tokens(self, rows: Tensor) -> Tensor:
        return (
            shuffled_views(rows, self.factor, self.grids) if self.grids else pixel_shuffle(rows, self.factor)
        )
