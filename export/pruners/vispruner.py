"""VisPruner (arXiv 2412.01818): important tokens by CLS attention, diverse ones by bipartite matching.

Site: vision. Inputs: image_features [B,N,C], before the projector and without CLS; attention_scores
[B,N], the mean over heads of the CLS query's row (or of the attention received, in towers without CLS).
Option: r (0.5), the share of important tokens. Default K: 64 of 576, as in the paper's tables.

1. floor(K·r) tokens with the highest attention are important; the residual keeps attention order.
2. While the residual is too long: its even places A are compared with its odd places B by cosine, and
   the (at most 8) members of A that are most like some member of B are dropped. What stays is A's
   survivors, most similar first, then B.

Every length is known at export, so the rounds are unrolled: one Gram matrix, from which each round gathers.
Departures from the published code, which selects the same set wherever it runs: it fails when the
residual is odd or a round wants to drop more than A has; here A is then one longer than B, and a round
drops at most half of the residual. Cosines are float64 (see `cosines`), a zero feature row is similar to
nothing instead of NaN, and ties go to the lower place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner

DROP = 8  # tokens dropped in a round, from the published code
GRAIN = 2.0**40  # cosines are told apart down to 1 / GRAIN


class VisPruner(Pruner):
    """Keeps floor(K·r) attended tokens and K - floor(K·r) tokens unlike each other."""

    name = "vispruner"
    site = "vision"
    needs = ("image_features", "attention_scores")
    options: ClassVar[dict[str, Any]] = {"r": 0.5}
    paper = "arXiv 2412.01818"

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        share = self.settings["r"]
        if not 0 <= share <= 1:
            raise UsageError(f"method vispruner: r {share} is outside 0 to 1, the share of important tokens")
        self.exact = True  # an engine without float64 (TensorRT) needs False
        self.important = int(keep * share)
        self.diverse = keep - self.important

    def forward(self, image_features: Tensor, attention_scores: Tensor) -> Tensor:  # type: ignore[override]
        """image_features [B,N,C], attention_scores [B,N] -> keep_indices [B,K]."""
        scores = attention_scores.float()
        if self.diverse == 0:
            return ops.raster(ops.top_k(scores, self.keep))
        order = ops.top_k(scores, self.count)
        residual = order[:, self.important :]
        likeness = self.cosines(ops.gather_rows(image_features, residual))
        spread = torch.gather(residual, 1, torch.ops.vtp.distinct(likeness, self.diverse))
        return ops.raster(torch.cat([order[:, : self.important], spread], dim=1))

    def cosines(self, rows: Tensor) -> Tensor:
        """Cosines [B,R,R] of all pairs of rows [B,R,C]; 0 for a zero row.

        A round sorts by them and deals the survivors out anew, so that one swap of near-equals changes
        every later round. In float64 they come out the same whatever order an engine sums in; the last
        bits are rounded off, so that equal rows stay equal.
        """
        rows = rows.to(torch.float64 if self.exact else torch.float32)
        rows = rows / rows.norm(dim=2, keepdim=True).clamp_min(1e-12)
        products = ops.products(rows)
        return torch.round(products * GRAIN) / GRAIN if self.exact else products


def rounds(count: int, keep: int) -> Iterator[tuple[int, int, int]]:
    """The schedule from `count` rows to `keep`: (length of A, length of B, rows dropped)."""
    while count > keep:
        drop = min(DROP, count - keep, count // 2)
        yield count - count // 2, count // 2, drop
        count -= drop


@torch.library.custom_op("vtp::distinct", mutates_args=())
def distinct(likeness: Tensor, keep: int) -> Tensor:
    """Which `keep` of R tokens survive the rounds, from their cosines [B,R,R]: numbers [B,keep].

    An operator with its own ONNX form: traced from torch, the rounds cost some 30 s of export time.
    """
    survivors = []
    for table in likeness:
        left = torch.arange(len(table), device=table.device)
        for _, _, drop in rounds(len(table), keep):
            even, odd = left[0::2], left[1::2]
            best = table[even][:, odd].amax(dim=1)
            order = torch.sort(best, descending=True, stable=True).indices
            left = torch.cat([even[order[drop:]], odd])
        survivors.append(left)
    return torch.stack(survivors)


@distinct.register_fake
def _(likeness: Tensor, keep: int) -> Tensor:
    return likeness.new_empty((likeness.shape[0], keep), dtype=torch.int64)


@ops.translates(torch.ops.vtp.distinct.default)
def _(likeness: Any, keep: int) -> Any:
    """The rounds in ONNX: about twelve nodes each.

    A round gathers whole lines of the matrix and hides all columns but B's with -inf: copying lines
    and masking is several times quicker than gathering the block A x B number by number.
    """
    op = ops.onnx_ops()
    count = likeness.shape[1]
    zero, one, two, size = (op.Constant(value_ints=[number]) for number in (0, 1, 2, count))
    wide = op.Concat(op.Shape(likeness, start=0, end=1), size, axis=0)  # [B, R]
    lines = op.Reshape(likeness, [-1, count])
    places = op.Constant(value_ints=list(range(count)))
    pictures = likeness.shape[0]
    left = ops.sized(op.Expand(places, wide), "INT64", pictures, count)
    batch = op.Squeeze(op.Shape(likeness, start=0, end=1))
    first_row, step = op.Constant(value_int=0), op.Constant(value_int=1)
    first = op.Unsqueeze(op.Mul(op.Range(first_row, batch, step), size), one)  # of each picture's lines
    first = ops.sized(first, "INT64", pictures, 1)
    hidden, clear = (
        ops.sized(op.Expand(op.Cast(value, to=likeness.dtype), wide), likeness.dtype, pictures, count)
        for value in (op.Constant(value_floats=[-np.inf]), op.Constant(value_floats=[0.0]))
    )
    for evens, odds, drop in rounds(count, keep):
        even, odd = op.Slice(left, zero, size, one, two), op.Slice(left, one, size, one, two)
        shown = op.Slice(clear, zero, op.Constant(value_ints=[odds]), one)
        mask = op.Unsqueeze(op.ScatterElements(hidden, odd, shown, axis=1), one)
        block = op.Add(op.Gather(lines, op.Add(even, first), axis=0), mask)
        _, order = op.TopK(op.ReduceMax(block, two, keepdims=0), op.Constant(value_ints=[evens]), axis=1)
        order = op.Slice(order, op.Constant(value_ints=[drop]), size, one)
        left = op.Concat(op.GatherElements(even, order, axis=1), odd, axis=1)
    return left
