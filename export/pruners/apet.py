"""ApET (arXiv 2602.19870): what a few tokens cannot make up is kept; no attention is read.

Site: vision; merges. Input: image_features [B,N,C], before the projector and without CLS. Option: basis (10),
the tokens that the others are approximated with. Default K: 64 of 576. As a second cut inside the decoder
(`--then apet`) it takes hidden_states in their place, and does the same.

1. The basis: place 0, then, each time, the token whose nearest basis token is farthest away.
2. Every token is approximated by the basis, as least squares with a ridge of 1e-5; its error is the length
   of what remains.
3. The K tokens with the largest errors, less the last `basis` of these, are kept, and the basis with them.
4. Every token that is not among the K is averaged into that kept one, basis aside, which it is most like by
   cosine: (kept + sum) / (1 + count).

keep_indices are the places of the kept tokens and of the basis. As in the published code, tokens of the basis
are passed on and averaged into others as well, and the `basis` tokens that give way to it are lost.

Departures from the published code: its first basis token is drawn at random. It puts the basis where the
tokens were that gave way to it, in ascending order of their places; here every token of the basis is at its
own place. It picks a place again where fewer than `basis` tokens differ, here the lowest free one. A basis
larger than K is cut to K. The ranking by errors is float64, to 26 binary places of the longest token. Inside
the decoder kept tokens keep their positions, where the code numbers the sequence anew.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import merge, ops
from vtp.export.pruners.base import Pruner

RIDGE = 1e-5  # from the published code
GRAIN = 2.0**26  # errors are told apart down to 1 / GRAIN of the longest token


class ApET(Pruner):
    """Keeps the basis and the tokens that it approximates worst, into which the others are averaged."""

    name = "apet"
    site = "vision"
    needs = ("image_features",)
    inside = ("hidden_states",)
    options: ClassVar[dict[str, Any]] = {"basis": 10}
    merges = True
    paper = "arXiv 2602.19870"

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        basis = self.settings["basis"]
        if basis < 1:
            raise UsageError(f"method apet: basis {basis} is below 1, the tokens that approximate others")
        self.exact = True  # an engine without float64 (TensorRT) needs False
        self.basis = min(basis, keep)

    def forward(self, **cues: Tensor) -> tuple[Tensor, Tensor]:
        """image_features, or hidden_states as a second cut, [B,N,C] -> keep_indices [B,K], rows [B,K,C]."""
        (image_features,) = cues.values()
        basis = self.spread(image_features.float())
        errors = self.errors(image_features, basis).scatter(1, basis, -1.0)
        order = ops.top_k(errors, self.count)
        hard, rest = order[:, : self.keep - self.basis], order[:, self.keep :]
        rows = ops.gather_rows(image_features, hard)
        if hard.shape[1] and rest.shape[1]:
            rows = merge.averaged(rows, ops.gather_rows(image_features, rest))
        rows = torch.cat([rows, ops.gather_rows(image_features, basis)], dim=1)
        return merge.in_raster_order(torch.cat([hard, basis], dim=1), rows)

    def spread(self, rows: Tensor) -> Tensor:
        """Places int64 [B,basis] of the basis, in order of picking, from rows float32 [B,N,C]."""
        picks = [torch.zeros_like(rows[:, :1, 0], dtype=torch.int64)]
        nearest = torch.full_like(rows[:, :, 0], torch.inf)
        for _ in range(self.basis - 1):
            away = rows - ops.gather_rows(rows, picks[-1])
            nearest = torch.minimum(nearest, (away * away).sum(dim=2)).scatter(1, picks[-1], -torch.inf)
            picks.append(nearest.argmax(dim=1, keepdim=True))
        return torch.cat(picks, dim=1)

    def errors(self, image_features: Tensor, basis: Tensor) -> Tensor:
        """How far rows [B,N,C] are from what the tokens `basis` [B,b] make of them, float32 [B,N]."""
        rows = image_features.to(torch.float64 if self.exact else torch.float32)
        seeds = ops.gather_rows(rows, basis)
        ridge = torch.matmul(seeds, seeds.transpose(1, 2)) + RIDGE * torch.eye(self.basis)
        shares = solve(ridge, torch.matmul(seeds, rows.transpose(1, 2)))
        away = (rows - torch.matmul(shares.transpose(1, 2), seeds)).norm(dim=2)
        longest = rows.norm(dim=2).amax(dim=1, keepdim=True).clamp_min(1e-30)
        return torch.round(away / longest * GRAIN).float() if self.exact else (away / longest)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """x [B,b,n] with matrix [B,b,b] · x = right [B,b,n], the matrix symmetric and positive definite.

    By Gauss and Jordan, which needs no pivots there: b steps on rows of b + n numbers.
    """
    table = torch.cat([matrix, right], dim=2)
    for step in range(matrix.shape[1]):
        line = table[:, step : step + 1] / table[:, step : step + 1, step : step + 1]
        column = table[:, :, step : step + 1]
        own = (torch.arange(matrix.shape[1]) == step).reshape(1, -1, 1)
        table = torch.where(own, line, table - column * line)
    return table[:, :, matrix.shape[1] :]
