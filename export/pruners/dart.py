"""DART (arXiv 2502.11494): what is least like a few pivots is not a duplicate of them.

Site: decoder:2 (between layers 1 and 2; the paper's K = 2). Inputs: keys [B,N,·], layer 2's k_proj of that
layer's input, heads side by side, without RoPE; hidden_states [B,N,D], that input. Options: pivots (8), keys
("normed" or "plain", with or without the layer's input norm before k_proj). Default K: 64 of 576.

1. The `pivots` tokens with the largest keys by L1 norm are pivots, and are kept.
2. Each pivot in turn, the largest key first, keeps the tokens not kept yet whose hidden states are least
   like its own by cosine. The pivots share the K - pivots places evenly, the first ones taking what is left.

Departures from the published code:
- It takes 4 pivots from the picture and 4 from the text. A pruner sees the picture only, so all 8 come
  from there.
- Its keys are layer 1's after RoPE; here they are layer 2's without it, the cue that this site offers.
- It compares hidden states after the decoder's last norm, whose weights a pruner does not see. Its scaling
  of a row does not change cosines, its weights of the columns do.
- The order in which its pivots choose is that of a Python set, in effect the place modulo a table's size;
  here it is the order of the norms.
- It keeps 4 + 8 · floor(M / 8) tokens for the number M asked for; here exactly K.
- Similarities and norms are float32 whatever the model's dtype; equal ones go to the lower index.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner

KEYS = ("normed", "plain")


class Dart(Pruner):
    """Keeps pivots of large keys and the tokens least like them."""

    name = "dart"
    site = "decoder:2"
    needs = ("keys", "hidden_states")
    options: ClassVar[dict[str, Any]] = {"pivots": 8, "keys": "normed"}
    paper = "arXiv 2502.11494"

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        pivots = self.settings["pivots"]
        if not 1 <= pivots <= self.count:
            raise UsageError(f"method dart: pivots {pivots} is outside 1 to {self.count}, the visual tokens")
        if self.settings["keys"] not in KEYS:
            raise UsageError(f"method dart: keys is '{self.settings['keys']}'; choose {' or '.join(KEYS)}")
        self.pivots = min(pivots, keep)

    def forward(self, keys: Tensor, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """keys [B,N,·], hidden_states [B,N,D] -> keep_indices [B,K]."""
        pivots = ops.top_k(keys.float().abs().sum(dim=2), self.pivots)
        states = ops.normalize(hidden_states)
        unlikeness = -torch.matmul(ops.gather_rows(states, pivots), states.transpose(1, 2))
        return ops.raster(self.choose(pivots, unlikeness))

    def choose(self, pivots: Tensor, unlikeness: Tensor) -> Tensor:
        """Indices [B,K] of pivots [B,P] and of what they choose in turn by unlikeness [B,P,N]."""
        taken = torch.zeros_like(unlikeness[:, 0]).scatter(1, pivots, -torch.inf)
        kept = [pivots]
        for place, count in enumerate(shares(self.keep - self.pivots, self.pivots)):
            if count:
                kept.append(ops.top_k(unlikeness[:, place] + taken, count))
                taken = taken.scatter(1, kept[-1], -torch.inf)
        return torch.cat(kept, dim=1)


def shares(count: int, parts: int) -> list[int]:
    """`count` split into `parts` whole numbers as even as can be, larger ones first."""
    return [count // parts + (part < count % parts) for part in range(parts)]
