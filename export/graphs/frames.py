"""The frames of a clip as one row of visual tokens.

Every frame goes through the tower alone; its tokens follow those of the frame before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Frames:
    """How F frames become P patches and, with what stands beside these, N tokens.

    count   F
    grid    (rows, columns) of the patches of a frame, as many as it has tokens for
    before  tokens in front of the patches of every frame, such as CLS
    after   tokens behind the last frame, such as the end of a line
    """

    count: int
    grid: tuple[int, int]
    before: int = 0
    after: int = 0

    @property
    def step(self) -> int:
        """Tokens from one frame to the next."""
        return self.before + self.grid[0] * self.grid[1]

    @property
    def patches(self) -> int:
        """P, of all frames."""
        return self.count * self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """N, of all frames."""
        return self.count * self.step + self.after

    def places(self) -> Tensor:
        """int64 [P]: the places of the patches among the N tokens."""
        return torch.arange(self.count * self.step).reshape(self.count, -1)[:, self.before :].flatten()


class FramesEncoder(nn.Module):
    """pixel_values [F,3,H,W] -> what `encoder` gives of every frame, [F,n,.], in one row [1,F*n,.]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.flatten(0, 1).unsqueeze(0) for output in self.encoder(pixel_values))


class PoolingProjector(nn.Module):
    """image_features [1,F*n*n,C] -> image_embeds [1,F*m*m,D], and `line_end` [D] behind them, if given.

    The projected n x n patches of each frame are resampled to m x m as by bilinear interpolation, which is a
    product with one and the same [m,n] along either axis.
    """

    weights: Tensor

    def __init__(self, projector: nn.Module, side: int, pooled: int, line_end: Tensor | None) -> None:
        super().__init__()
        self.projector = projector
        self.side, self.pooled = side, pooled
        self.line_end = line_end
        along = functional.interpolate(torch.eye(side).unsqueeze(0), size=pooled, mode="linear")
        self.register_buffer("weights", along[0].T.contiguous(), persistent=False)

    def forward(self, image_features: Tensor) -> Tensor:
        """image_features [1,F*n*n,C] -> tokens [1,F*m*m,D], one more with `line_end`; see the class."""
        patches = self.projector(image_features)
        side, pooled, width = self.side, self.pooled, patches.shape[-1]
        weights = self.weights.to(patches.dtype)
        rows = torch.matmul(weights, patches.reshape(-1, side, side * width))  # [F,m,n*D]
        tokens = torch.matmul(weights, rows.reshape(-1, pooled, side, width)).reshape(1, -1, width)
        if self.line_end is None:
            return tokens
        return torch.cat([tokens, self.line_end.to(tokens.dtype).reshape(1, 1, width)], dim=1)
