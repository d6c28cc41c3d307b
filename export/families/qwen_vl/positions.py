"""The splice that numbers rows and columns of a picture's grid (Qwen-VL's M-RoPE, see `rotary`).

Source: transformers' `get_rope_index` in modeling_qwen2_vl.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vtp.export.graphs.splice import Splice


class GridSplice(Splice):
    """Put M image tokens in the place of each of a prompt's I pictures; number their rows and columns.

    inputs_embeds [B,T,D], image_embeds [B*I,M,D], image_start int64 [B,I] ascending (and keep_indices int64
    [B*I,M], without which all N tokens come) -> prompt_embeds [B,S,D], position_ids int64 [B,S,3],
    next_position int64 [B], where S = T + I * (M - placeholders).

    The token in row r and column c of a grid has the position start + (0, r, c), kept or not, where start
    comes right after whatever stands in front of the picture; what follows goes on from start + the longer
    edge of the grid.
    """

    steps: Tensor

    def __init__(self, placeholders: int, grid: tuple[int, int]) -> None:
        super().__init__(placeholders, grid[0] * grid[1])
        self.reads_keep = True
        self.edge = max(grid)
        rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        steps = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1)
        self.register_buffer("steps", steps.reshape(-1, 3), persistent=False)

    def forward(
        self,
        inputs_embeds: Tensor,
        image_embeds: Tensor,
        image_start: Tensor,
        keep_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The merged rows, their position ids in three axes, and the position that follows the prompt."""
        at, prompt = self._merged(inputs_embeds, image_embeds, image_start)
        visual, images = image_embeds.shape[1], image_start.shape[1]
        if keep_indices is None:
            token = torch.where(at.inside, at.seen - at.passed * visual, 0)
        else:
            token = self._tokens(at, keep_indices, images)
        start = at.words + at.passed * self.edge  # and text is at step 0 of itself
        position_ids = start.unsqueeze(2) + functional.embedding(token, self.steps)
        after = inputs_embeds.shape[1] + images * (self.edge - self.placeholders)
        return prompt, position_ids, torch.zeros_like(image_start[:, 0]) + after
