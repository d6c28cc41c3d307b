"""Pixel shuffle: factor x factor neighbouring patches of a square view become one visual token.

Source: `pixel_shuffle` of transformers' modeling_internvl.py and modeling_idefics3.py, which agree: the
channels of a token are its patches' side by side, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vtp.export.tower_cues import SCORES


def pixel_shuffle(rows: Tensor, factor: int) -> Tensor:
    """[V,n,C] of square views -> [V,n/factor²,factor²·C]."""
    views, count, width = rows.shape
    side = int(count**0.5) // factor
    blocks = rows.reshape(views, side, factor, side, factor, width).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(views, side * side, factor * factor * width)


class ShuffledEncoder(nn.Module):
    """pixel_values -> image_features [B,P,factor²·C] and the cues asked for, of tokens instead of patches.

    encoder   gives image_features [V,n,C] and cues of n patches a view
    one_view  True: V is a batch of pictures. False: V views are the parts of one picture, whose tokens follow
              one another.
    A token's scores are the mean of its patches', its vision_keys theirs side by side.
    """

    def __init__(self, encoder: nn.Module, cues: Sequence[str], factor: int, one_view: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.cues, self.factor, self.one_view = cues, factor, one_view

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        features, *read = self.encoder(pixel_values)
        tokens = [pixel_shuffle(features, self.factor)]
        for name, cue in zip(self.cues, read, strict=True):
            if name in SCORES:
                tokens.append(pixel_shuffle(cue.unsqueeze(2), self.factor).mean(dim=2))
            else:
                tokens.append(pixel_shuffle(cue, self.factor))
        return tuple(tokens) if self.one_view else tuple(item.flatten(0, 1).unsqueeze(0) for item in tokens)
