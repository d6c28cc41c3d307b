"""PruneSID (arXiv 2603.09480): groups of tokens by principal directions, and no near-twins within a group.

Site: vision. Inputs: image_features [B,N,C], before the projector and without CLS; attention_scores [B,N],
the mean over heads of the CLS query's row (or of the attention received, in towers without CLS). Option:
group (4), the kept tokens for one direction. Default K: 64 of 576.

1. q = K / 4 principal directions over the tokens, of the features' sigmoids less each token's mean. A token
   belongs to the direction in which it weighs most.
2. Within a group, in order of attention, a token falls if its cosine with one that stands is more than
   K / 32 times the mean cosine of all pairs.
3. A group's quota: one token, and a share of the K in proportion to those standing, rounded so that shares
   add up. It is at most 5·ceil(K / 64) and at most what stands; both bounds rise together, up to the group's
   size, while K cannot be reached. Places left go to the groups with most standing.
4. A group gives those standing first, then those that fell, in order of attention.

Departures from the published code:
- Its directions come from `torch.pca_lowrank`, which starts from random numbers: with another seed the code
  keeps 43 to 89 % of the same tokens (docs/methods.md). Here six steps of subspace iteration start from fixed
  ones, orthonormalised column by column, and are not turned to principal axes within the subspace.
- It passes CLS on as one of its K tokens; here all K are patches. Attention is the mean over heads where it
  takes the sum.
- Its rule of step 2 goes on until all tokens are decided; here it stops after 32 rounds, each of which
  decides at least all tokens that depend on decided ones alone.
- Shares are rounded half up, to whole numbers exactly. Directions, cosines and their mean are float64; a
  weight counts to 20 binary places. Ties go to the lower index. A zero row is like nothing.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner

STEPS = 6  # of subspace iteration
ROUNDS = 32  # of suppression
GRAIN = 2.0**20  # weights in directions are told apart down to 1 / GRAIN
SLACK = 2.0**-30  # by how much a cosine must be above the threshold


class PruneSID(Pruner):
    """Keeps tokens of every principal direction, the attended and unlike ones first."""

    name = "prunesid"
    site = "vision"
    needs = ("image_features", "attention_scores")
    options: ClassVar[dict[str, Any]] = {"group": 4}
    paper = "arXiv 2603.09480"

    start: Tensor

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        if self.settings["group"] < 1:
            raise UsageError(
                f"method prunesid: group {self.settings['group']} is below 1, the kept tokens for a direction"
            )
        self.exact = True  # an engine without float64 (TensorRT) needs False
        self.groups = max(1, keep // self.settings["group"])
        start = np.random.default_rng(0).standard_normal((self.groups, self.count))
        self.register_buffer("start", torch.from_numpy(start.astype(np.float32)).unsqueeze(0))

    def forward(self, image_features: Tensor, attention_scores: Tensor) -> Tensor:  # type: ignore[override]
        """image_features [B,N,C], attention_scores [B,N] -> keep_indices [B,K]."""
        rows = image_features.to(torch.float64 if self.exact else torch.float32)
        group = self.directions(rows).abs().mul(GRAIN).round().argmax(dim=1)  # [B,N]
        order = ops.top_k(attention_scores.float(), self.count)
        places = torch.arange(self.count).expand_as(order)
        rank = torch.zeros_like(order).scatter(1, order, places).float()
        same = group.unsqueeze(2) == group.unsqueeze(1)
        standing = self.standing(self.twins(rows) & same & (rank.unsqueeze(1) < rank.unsqueeze(2)))
        rank = rank - standing * self.count
        ahead = (same & (rank.unsqueeze(1) < rank.unsqueeze(2))).float().sum(dim=2)
        member = (group.unsqueeze(1) == torch.arange(self.groups).unsqueeze(1)).float()  # [B,q,N]
        quota = self.quotas(member.sum(dim=2), torch.matmul(member, standing.unsqueeze(2)).squeeze(2))
        own = torch.matmul(quota.unsqueeze(1), member).squeeze(1)
        return ops.top_k((ahead < own).float(), self.keep)  # of ones the lower index first: ascending

    def directions(self, rows: Tensor) -> Tensor:
        """Orthonormal directions [B,q,N] over the tokens, from rows [B,N,C]; zeros where there are fewer."""
        weights = torch.sigmoid(rows)
        weights = weights - weights.mean(dim=2, keepdim=True)
        spread = ops.products(weights)
        lines = self.start.to(rows.dtype).expand(rows.shape[0], -1, -1)
        for _ in range(STEPS):
            lines = torch.ops.vtp.orthonormal(torch.matmul(lines, spread))
        return lines

    def twins(self, rows: Tensor) -> Tensor:
        """Whether two of rows [B,N,C] are too like each other to be kept both: bool [B,N,N]."""
        units = rows / rows.norm(dim=2, keepdim=True).clamp_min(1e-12)
        whole, own = units.sum(dim=1), (units * units).sum(dim=(1, 2))
        pairs = max(1, self.count * (self.count - 1))
        mean = ((whole * whole).sum(dim=1) - own) / pairs
        threshold = mean * (self.keep / 32) + SLACK
        return ops.products(units) > threshold.reshape(-1, 1, 1)

    def standing(self, falls: Tensor) -> Tensor:
        """1 for tokens that no standing one fells, else 0, float32 [B,N]; falls [B,N,N]: [i,j], j fells i."""
        felled = falls.float()
        standing = torch.ones_like(felled[:, :, :1])
        for _ in range(min(ROUNDS, self.count)):
            standing = (torch.matmul(felled, standing) < 0.5).float()
        return standing.squeeze(2)

    def quotas(self, sizes: Tensor, standing: Tensor) -> Tensor:
        """Tokens that groups give, [B,q], from their sizes and the numbers standing, whole float32 [B,q]."""
        least = sizes.clamp_max(1)
        most = self.raised(standing.clamp_max(5 * math.ceil(self.keep / 64)), sizes)
        others = self.keep - least.sum(dim=1, keepdim=True)
        upto, whole = self.running(standing), standing.sum(dim=1, keepdim=True)
        dealt = torch.floor((2 * upto * others + whole) / (2 * whole))
        before = torch.floor((2 * (upto - standing) * others + whole) / (2 * whole))
        quota = torch.minimum(least + dealt - before, most)
        order = ops.top_k(standing, self.groups)
        room = torch.gather(most - quota, 1, order)
        left = self.keep - quota.sum(dim=1, keepdim=True)
        filled = torch.minimum((left - self.running(room) + room).clamp_min(0), room)
        return quota + torch.zeros_like(quota).scatter(1, order, filled)

    def raised(self, most: Tensor, sizes: Tensor) -> Tensor:
        """Bounds [B,q] raised alike, up to the groups' sizes, until they allow K tokens."""
        steps = torch.arange(self.count, dtype=torch.float32).reshape(-1, 1)
        allowed = torch.minimum(most.unsqueeze(1) + steps, sizes.unsqueeze(1)).sum(dim=2)
        missing = (allowed < self.keep).float().sum(dim=1, keepdim=True)
        return torch.minimum(most + missing, sizes)

    def running(self, values: Tensor) -> Tensor:
        """Running sums [B,q] of values [B,q]."""
        places = torch.arange(self.groups)
        return torch.matmul(values, (places.unsqueeze(1) <= places).float())


@torch.library.custom_op("vtp::orthonormal", mutates_args=())
def orthonormal(lines: Tensor) -> Tensor:
    """Lines [B,q,N] made orthonormal in turn (Gram and Schmidt), in their dtype.

    A line of which next to nothing is left beside those before it becomes zero.
    """
    made: list[Tensor] = []
    for place in range(lines.shape[1]):
        line = lines[:, place : place + 1]
        rest = line
        if made:
            others = torch.cat(made, dim=1)
            rest = line - torch.matmul(torch.matmul(others, line.transpose(1, 2)).transpose(1, 2), others)
        length, left = (line * line).sum(dim=2, keepdim=True), (rest * rest).sum(dim=2, keepdim=True)
        made.append(torch.where(left > length * _least(lines.dtype), rest / left.sqrt(), 0.0))
    return torch.cat(made, dim=1)


def _least(dtype: torch.dtype) -> float:
    """The share of a line's squared length below which it is rounding."""
    return 1e-20 if dtype == torch.float64 else 1e-10


@orthonormal.register_fake
def _(lines: Tensor) -> Tensor:
    return torch.empty_like(lines)


@ops.translates(torch.ops.vtp.orthonormal.default)
def _(lines: Any) -> Any:
    """Some fifteen nodes a line."""
    op, (batch, count, width) = ops.onnx_ops(), lines.shape
    exact = lines.dtype == lines.dtype.__class__.DOUBLE
    number = [op.Cast(op.Constant(value_float=value), to=lines.dtype) for value in (0.0, 1.0)]
    least = op.Cast(op.Constant(value_float=1e-20 if exact else 1e-10), to=lines.dtype)
    last, turn, row = (op.Constant(value_ints=list(axes)) for axes in ((2,), (0, width, 1), (0, 1, -1)))
    others: Any = None
    for place in range(count):
        line = op.Gather(lines, op.Constant(value_ints=[place]), axis=1)  # [B,1,N]
        line = ops.sized(line, lines.dtype, batch, 1, width)
        rest = line
        if others is not None:
            shares = op.Reshape(op.MatMul(others, op.Reshape(line, turn)), row)
            rest = op.Sub(line, op.MatMul(shares, others))
        length, left = (op.ReduceSum(op.Mul(part, part), last, keepdims=1) for part in (line, rest))
        some = op.Greater(left, op.Mul(length, least))
        made = op.Where(some, op.Div(rest, op.Sqrt(op.Where(some, left, number[1]))), number[0])
        made = ops.sized(made, lines.dtype, batch, 1, width)
        others = made if others is None else op.Concat(others, made, axis=1)
        others = ops.sized(others, lines.dtype, batch, place + 1, width)
    return others
