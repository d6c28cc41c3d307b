"""States of decoder layers: what is carried from run to run where a layer has no keys and values.

They are written in plain operators, for all targets alike: a row's padding never enters a state, and a run on
an empty cache does not look at what the state's tensor holds (see `StateTensors`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

CONV = "conv"  # the last inputs of a convolution along the tokens


def begun(state: Tensor, fresh: Tensor) -> Tensor:
    """A state [B,...] before a run; zeros where the run is on an empty cache, `fresh` bool []."""
    return state.masked_fill(fresh, 0.0)


def append_rows(state: Tensor, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The last L inputs [B,D,L] before new ones [B,D,S]: all of them [B,D,L+S], and the last L real ones.

    ends  int64 [B]: how many of the S are no padding
    """
    joined = torch.cat([state, rows], dim=2)
    places = ends.unsqueeze(1) + torch.arange(state.shape[2])  # [B,L]
    places = places.unsqueeze(1).expand(joined.shape[0], joined.shape[1], state.shape[2])
    return joined, torch.gather(joined, 2, places)


def causal_convolution(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """transformers' `causal_conv1d_fn` of what `append_rows` joined, [B,D,L+S] -> the S new ones [B,D,S].

    A channel is convolved with its own weight [D,L]: L products and their sum, which engines fuse, where a
    grouped convolution is slow on most of them.
    """
    length = weight.shape[1]
    count = rows.shape[2] - length
    parts = [rows[:, :, 1 + tap : 1 + tap + count] * weight[:, tap : tap + 1] for tap in range(length)]
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    out = out if bias is None else out + bias.unsqueeze(1)
    return out if activation is None else ACT2FN[activation](out)
