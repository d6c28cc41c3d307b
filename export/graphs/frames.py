"""The frames of a clip as one row of visual tokens.

Every frame goes through the tower alone; its tokens follow those of the frame before. In towers with CLS that
token is one of them, the first of its frame: video models hand it on, and their picture towers do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Frames:
    """How F frames become P patches and, with a CLS token each, N tokens.

    count    F
    grid     (rows, columns) of the patches of a frame
    has_cls  whether a frame has a CLS token in front of its patches
    """

    count: int
    grid: tuple[int, int]
    has_cls: bool

    @property
    def patches(self) -> int:
        """P, of all frames."""
        return self.count * self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """N, of all frames."""
        return self.patches + self.count * self.has_cls

    def places(self) -> Tensor:
        """int64 [P]: the places of the patches among the N tokens."""
        tokens = torch.arange(self.tokens).reshape(self.count, -1)
        return tokens[:, int(self.has_cls) :].flatten()


class FramesEncoder(nn.Module):
    """pixel_values [F,3,H,W] -> what `encoder` gives of every frame, [F,n,.], in one row [1,F*n,.]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.flatten(0, 1).unsqueeze(0) for output in self.encoder(pixel_values))
