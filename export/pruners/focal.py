"""Focal, this project's own method: look where attention is, and each look dims what lies near and alike.

Site: vision. Inputs: image_features [B,N,C], before the projector and without CLS; attention_scores
[B,N], the mean over heads of the CLS query's row (or of the attention received, in towers without CLS).
Option: reach (1.0), see below. Default K: 64 of 576. Kept tokens are numbered compactly.

K times the token i with the highest score is kept (equal scores: the lowest index), and every other token
j has its score multiplied by

    1 - exp(-d²_ij / (2·sigma²)) · (1 + cos(f_i - m, f_j - m)) / 2,      sigma = reach · sqrt(N / K)

with the scores starting as the attention, d the distance on the grid, f the features and m their mean over
the picture. A token beside a kept one that shows the same keeps next to nothing; one that shows something
else keeps its score, wherever it is, and so does one that is far away.

Where the pieces come from: multiplying scores by one minus nearness times likeness is AdaptPrune's (arXiv
2503.08019), there on the decoder's attention and keys, with fixed widths; cosines from the mean feature are
Cen-Prune's; ranking by the tower's attention before the projector is VisPruner's (arXiv 2412.01818). Its
own are the width, sqrt(N / K), which is how far apart K tokens lie when spread evenly, so that a picture is
looked at more coarsely the fewer looks there are, and the half-cosine, which needs no width at all: unlike
tokens (cos = -1) never dim each other, unrelated ones half as much as equal ones.

docs/focal.md has what was tried and measured. Cost: one N x N product of the features, then K·N steps.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner


class Focal(Pruner):
    """Keeps K attended tokens; each dims its neighbours as far as they are like it."""

    name = "focal"
    site = "vision"
    needs = ("image_features", "attention_scores")
    reads_grid = True
    options: ClassVar[dict[str, Any]] = {"reach": 1.0}
    paper = ""

    table: Tensor

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        reach = self.settings["reach"]
        if not 0.01 <= reach <= 100:
            raise UsageError(
                f"method focal: reach {reach} is outside 0.01 to 100, in spacings of kept tokens"
            )
        self.register_buffer("table", half_nearness(grid, reach * math.sqrt(self.count / keep)))

    def forward(self, image_features: Tensor, attention_scores: Tensor) -> Tensor:  # type: ignore[override]
        """image_features [B,N,C], attention_scores [B,N] -> keep_indices [B,K]."""
        factors = 1 - self.nearness() * (1 + self.likeness(image_features))
        return ops.raster(torch.ops.vtp.dim(attention_scores.float(), factors, self.keep))

    def likeness(self, features: Tensor) -> Tensor:
        """Cosines [B,N,N] of features [B,N,C] seen from their mean; 0 for a feature that is the mean.

        N·f - sum(f) has the direction of f - m, without a quotient that would tell equal rows apart.
        """
        rows = features.float()
        rows = rows * self.count - rows.sum(dim=1, keepdim=True)
        length = rows.norm(dim=2, keepdim=True).clamp_min(1e-12)
        # Dividing N² products is cheaper than normalising N·C numbers.
        products = torch.matmul(rows, rows.transpose(1, 2))
        return (products / (length * length.transpose(1, 2))).clamp(-1, 1)

    def nearness(self) -> Tensor:
        """Half the spatial factors [N,N]."""
        return ops.by_distance(self.table, self.grid)


def half_nearness(grid: tuple[int, int], sigma: float) -> Tensor:
    """exp(-d²/(2·sigma²)) / 2, float32 [H·W,1], indexed by |dy|·W + |dx|.

    At most the float32 below 1/2 for d > 0, so that no factor but a token's own becomes 0.
    """
    y = torch.arange(grid[0], dtype=torch.float64).unsqueeze(1)
    x = torch.arange(grid[1], dtype=torch.float64)
    near = (torch.exp(-(y * y + x * x) / (2 * sigma**2)) / 2).float().reshape(-1, 1)
    near[1:].clamp_(max=0.5 - 2.0**-24)
    return near


@torch.library.custom_op("vtp::dim", mutates_args=())
def dim(scores: Tensor, factors: Tensor, keep: int) -> Tensor:
    """Picks [B,keep] in order of picking, from scores float32 [B,N] and factors float32 [B,N,N].

    Each pick i takes the highest score and multiplies the others by factors[i]. Off the diagonal factors
    are positive, so that the -inf of a pick stays what it is.
    """
    chosen = []
    for score, table in zip(scores, factors, strict=True):
        picks: list[int] = []
        while len(picks) < keep:
            best = int(score.argmax())
            score = score * table[best]
            score[best] = -torch.inf
            picks.append(best)
        chosen.append(picks)
    return torch.tensor(chosen, dtype=torch.int64, device=scores.device).reshape(-1, keep)


@dim.register_fake
def _(scores: Tensor, factors: Tensor, keep: int) -> Tensor:
    return scores.new_empty((scores.shape[0], keep), dtype=torch.int64)


@ops.translates(torch.ops.vtp.dim.default)
def _(scores: Any, factors: Any, keep: int) -> Any:
    """Five nodes a pick: ArgMax, Add, Gather, Mul, ScatterElements."""
    op, count = ops.onnx_ops(), factors.shape[1]
    lines = op.Reshape(factors, op.Constant(value_ints=[-1, count]))
    batch, one = op.Shape(factors, start=0, end=1), op.Constant(value_ints=[1])
    zero, step = op.Constant(value_int=0), op.Constant(value_int=1)
    first = op.Mul(op.Range(zero, op.Squeeze(batch), step), op.Constant(value_int=count))
    first = op.Unsqueeze(first, one)  # of each picture's lines, int64 [B,1]
    gone = op.Expand(op.Constant(value_float=-math.inf), op.Concat(batch, one, axis=0))
    picks = [op.ArgMax(scores, axis=1, keepdims=1)]
    while len(picks) < keep:
        line = op.Squeeze(op.Gather(lines, op.Add(picks[-1], first), axis=0), one)
        scores = op.ScatterElements(op.Mul(scores, line), picks[-1], gone, axis=1)
        picks.append(op.ArgMax(scores, axis=1, keepdims=1))
    return op.Concat(*picks, axis=1)
