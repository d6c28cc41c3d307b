"""Where a prompt's pictures lie, place by place: what every splice counts with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Of every place of a sequence, [B,S]:

    words   int64, the tokens in front of it that belong to no picture
    passed  int64, the pictures that are over
    inside  bool, whether it lies in a picture
    seen    int64, the tokens of pictures in front of it
    """

    words: Tensor
    passed: Tensor
    inside: Tensor
    seen: Tensor


def lay_out(length: int, starts: Tensor, size: int) -> Layout:
    """Places 0 to `length` - 1 with pictures of `size` tokens from starts int64 [B,I] on, ascending."""
    place = torch.arange(length).unsqueeze(0)  # [1,S]
    since = place.unsqueeze(2) - starts.unsqueeze(1)  # [B,S,I]
    passed = (since >= size).to(torch.int64).sum(dim=2)
    inside = (since >= 0).to(torch.int64).sum(dim=2) > passed
    seen = since.clamp(0, size).sum(dim=2)
    return Layout(place - seen, passed, inside, seen)


def widened(starts: Tensor, wider: int) -> Tensor:
    """Where pictures begin, [B,I], once each of them takes `wider` more places than at `starts` [B,I]."""
    return starts + torch.arange(starts.shape[1]) * wider
