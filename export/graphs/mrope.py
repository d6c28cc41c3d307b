"""The splice that numbers rows and columns of a picture's grid (Qwen-VL's M-RoPE, see `rotary`).

Source: transformers' `get_rope_index` in modeling_qwen2_vl.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vtp.export.graphs.modules import Splice


class GridSplice(Splice):
    """Put M image tokens in the place of a prompt's placeholder; number rows and columns of their grid.

    inputs_embeds [B,T,D], image_embeds [B,M,D], image_start int64 [B,1] (and keep_indices int64 [B,M],
    without which all N tokens come) -> prompt_embeds [B,S,D], position_ids int64 [B,S,3], next_position int64
    [B], where S = T - placeholders + M.

    The token in row r and column c of the grid has the position start + (0, r, c), kept or not; the text
    after the picture goes on from start + the longer edge of the grid.
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
        prompt, place, total = super().forward(inputs_embeds, image_embeds, image_start)
        visual, start = image_embeds.shape[1], image_start
        token = (place - start).clamp(0, visual - 1)
        if keep_indices is not None:
            token = torch.gather(keep_indices, 1, token)
        inside = start.unsqueeze(2) + functional.embedding(token, self.steps)
        place, start = place.unsqueeze(2), start.unsqueeze(2)
        after = torch.where(place < start + visual, inside, place - visual + self.edge)
        return prompt, torch.where(place < start, place, after), total - visual + self.edge
