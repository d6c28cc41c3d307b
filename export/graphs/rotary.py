"""The rotary embedding of positions along several axes (Qwen-VL's M-RoPE).

Source: transformers' modeling_qwen2_vl.py (Wang et al., arXiv 2409.12191). A token's position is told by A
numbers (time, row, column), equal to one another for text; each angle of the embedding belongs to one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TextRotary(nn.Module):
    """hidden [B,S,D], position_ids int64 [B,S] -> cos, sin [B,S,d], of an embedding whose axes all agree.

    `rotary` is the model's own, made for several axes.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids.unsqueeze(2).float() * self.rotary.inv_freq.float()
        angles, scaling = torch.cat([angles, angles], dim=-1), self.rotary.attention_scaling
        return (angles.cos() * scaling).to(hidden.dtype), (angles.sin() * scaling).to(hidden.dtype)


class AxesRotary(nn.Module):
    """hidden [B,S,D], position_ids int64 [B,S,A] -> cos, sin [B,S,d] in the dtype of hidden.

    `rotary` is the model's own embedding, whose `recomposition_frequencies` says which axis an angle is of.
    """

    axis: Tensor

    def __init__(self, rotary: Any, axes: int) -> None:
        super().__init__()
        self.rotary = rotary
        numbered = torch.arange(float(axes)).view(axes, 1, 1, 1).repeat(1, 1, 1, rotary.inv_freq.shape[0])
        axis = rotary.recomposition_frequencies(numbered)[0, 0].to(torch.int64)
        self.register_buffer("axis", axis[: len(axis) // 2], persistent=False)

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids.index_select(2, self.axis).float() * self.rotary.inv_freq.float()
        angles, scaling = torch.cat([angles, angles], dim=-1), self.rotary.attention_scaling
        return (angles.cos() * scaling).to(hidden.dtype), (angles.sin() * scaling).to(hidden.dtype)
