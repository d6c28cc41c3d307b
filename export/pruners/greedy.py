"""Greedy selection over a matrix of likenesses: K picks, each changing what the next one is worth.

Three rules: `farthest` takes the token least like those picked, `cover` the one that represents most of the
picture, `volume` the one of which the picks leave most. Each is an operator with its own ONNX form, for
traced from torch the K unrolled steps cost many times more export time. Ties go to the lower index.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtp.export.pruners import ops


def cosines(rows: Tensor) -> Tensor:
    """Cosines float32 [B,N,N] of all pairs of rows [B,N,C]; 0 for a zero row."""
    return ops.products(ops.normalize(rows))


# -- farthest first ------------------------------------------------------------------------------------------


@torch.library.custom_op("vtp::farthest", mutates_args=())
def farthest(likeness: Tensor, keep: int) -> Tensor:
    """Picks [B,keep] in order of picking, from likenesses float32 [B,N,N] (the diagonal is not read).

    First the token whose nearest other token is farthest; then, each time, the token whose nearest pick
    is farthest.
    """
    chosen = []
    for table in likeness:
        best = int(table.clone().fill_diagonal_(-torch.inf).amax(dim=1).argmin())
        table = table.clone().fill_diagonal_(torch.inf)  # a pick is infinitely like itself: never again
        nearest, picks = table[best], [best]
        while len(picks) < keep:
            best = int(nearest.argmin())
            nearest = torch.maximum(nearest, table[best])
            picks.append(best)
        chosen.append(picks)
    return torch.tensor(chosen, dtype=torch.int64, device=likeness.device).reshape(-1, keep)


@farthest.register_fake
def _(likeness: Tensor, keep: int) -> Tensor:
    return likeness.new_empty((likeness.shape[0], keep), dtype=torch.int64)


@ops.translates(torch.ops.vtp.farthest.default)
def _(likeness: Any, keep: int) -> Any:
    """Four nodes a pick: ArgMin, Add, Gather, Max."""
    op, count = ops.onnx_ops(), likeness.shape[1]
    own = _diagonal(op, count)
    nearest = op.ReduceMax(op.Where(own, _number(op, -np.inf), likeness), _axes(op, 2), keepdims=0)
    lines, first = _lines(op, op.Where(own, _number(op, np.inf), likeness), likeness)
    nearest = op.Unsqueeze(nearest, _axes(op, 1))  # [B,1,N], as lines are gathered
    picks = [op.ArgMin(nearest, axis=2, keepdims=0)]
    for step in range(1, keep):
        line = op.Gather(lines, op.Add(picks[-1], first), axis=0)
        nearest = line if step == 1 else op.Max(nearest, line)
        picks.append(op.ArgMin(nearest, axis=2, keepdims=0))
    return op.Concat(*picks, axis=1)


# -- coverage ------------------------------------------------------------------------------------------------


@torch.library.custom_op("vtp::cover", mutates_args=())
def cover(likeness: Tensor, weights: Tensor, keep: int) -> Tensor:
    """Picks [B,keep] in order of picking, from likenesses float32 [B,N,N] and weights float32 [B,N].

    A token is covered as far as its likest pick is like it, 0 without picks. Each time the token is
    picked whose weight times the coverage it would add, summed over all tokens, is highest.
    """
    chosen = []
    for table, weight in zip(likeness, weights, strict=True):
        covered, taken = torch.zeros_like(weight), torch.zeros_like(weight)
        picks: list[int] = []
        while len(picks) < keep:
            gain = (table - covered).clamp_min(0).sum(dim=1)
            best = int((gain * weight + taken).argmax())
            covered = torch.maximum(covered, table[best])
            taken[best] = -torch.inf
            picks.append(best)
        chosen.append(picks)
    return torch.tensor(chosen, dtype=torch.int64, device=likeness.device).reshape(-1, keep)


@cover.register_fake
def _(likeness: Tensor, weights: Tensor, keep: int) -> Tensor:
    return likeness.new_empty((likeness.shape[0], keep), dtype=torch.int64)


@ops.translates(torch.ops.vtp.cover.default)
def _(likeness: Any, weights: Any, keep: int) -> Any:
    """Ten nodes a pick, three of which pass over the whole matrix."""
    op = ops.onnx_ops()
    lines, first = _lines(op, likeness, likeness)
    taken = op.Sub(weights, weights)  # [B,N] of 0, -inf for a pick
    covered = op.Unsqueeze(taken, _axes(op, 1))  # [B,1,N]
    gone = op.Expand(_number(op, -np.inf), op.Concat(_batch(op, likeness), _axes(op, 1), axis=0))
    gone = ops.sized(gone, weights.dtype, likeness.shape[0], 1)
    picks: list[Any] = []
    for step in range(keep):
        if step:
            covered = op.Max(covered, op.Gather(lines, op.Add(picks[-1], first), axis=0))
            taken = op.ScatterElements(taken, picks[-1], gone, axis=1)
        more = op.ReduceSum(op.Relu(op.Sub(likeness, covered)), _axes(op, 2), keepdims=0)
        picks.append(op.ArgMax(op.Add(op.Mul(more, weights), taken), axis=1, keepdims=1))
    return op.Concat(*picks, axis=1)


# -- volume --------------------------------------------------------------------------------------------------

LEAST = 2.0**-20  # less than this of a token counts as this much: cosines in float32 tell no more
GRAIN = 2.0**40  # float64 products are told apart down to 1 / GRAIN
PART = 32  # lines that are added one by one before they join the older ones


@torch.library.custom_op("vtp::volume", mutates_args=())
def volume(likeness: Tensor, weights: Tensor, keep: int) -> Tensor:
    """Picks [B,keep] in order of picking, from likenesses float32 [B,N,N] and weights >= 0 [B,N].

    Each time the token is picked whose weight times what is left of it (1 - its squared part in the span
    of the picks) is largest: with it the picks' determinant of sqrt(weight) likeness sqrt(weight) is.
    What is left comes from Cholesky's steps, a line of N numbers for each pick, in the weights' dtype; a pick
    of which nothing was left adds none.
    """
    chosen = []
    for table, weight in zip(likeness, weights, strict=True):
        left, worth = torch.ones_like(weight), weight * GRAIN
        lines = weight.new_zeros((keep, len(weight)))
        picks: list[int] = []
        for step in range(keep):
            best = int(_grained(worth * left).argmax())
            line = table[best].to(weight.dtype) - lines[:step, best] @ lines[:step]
            if left[best] > LEAST:  # else the pick explains nothing, and rounding would explode
                lines[step] = line / left[best].sqrt()
            left = (left - lines[step] * lines[step]).clamp_min(LEAST)
            worth[best] = -torch.inf
            picks.append(best)
        chosen.append(picks)
    return torch.tensor(chosen, dtype=torch.int64, device=likeness.device).reshape(-1, keep)


def _grained(values: Tensor) -> Tensor:
    return values.round() if values.dtype == torch.float64 else values


@volume.register_fake
def _(likeness: Tensor, weights: Tensor, keep: int) -> Tensor:
    return likeness.new_empty((likeness.shape[0], keep), dtype=torch.int64)


@ops.translates(torch.ops.vtp.volume.default)
def _(likeness: Any, weights: Any, keep: int) -> Any:
    """Some twenty nodes a pick, which pass over as many lines of N as there are picks."""
    op, count = ops.onnx_ops(), likeness.shape[1]
    exact = weights.dtype == likeness.dtype.__class__.DOUBLE
    rows, first = _lines(op, likeness, likeness)
    number = [op.Cast(_number(op, value), to=weights.dtype) for value in (1.0, -np.inf, LEAST, GRAIN, 0.0)]
    worth = op.Unsqueeze(op.Mul(weights, number[3]), _axes(op, 1))  # [B,1,N], -inf for a pick
    gone = op.Expand(number[1], op.Concat(_batch(op, likeness), _axes(op, 1, 1), axis=0))
    gone = ops.sized(gone, weights.dtype, likeness.shape[0], 1, 1)
    left = ops.sized(op.Expand(number[0], op.Shape(worth)), weights.dtype, likeness.shape[0], 1, count)
    older: Any = None  # lines [B,.,N] of the picks, in two parts: Concat copies only the newer one
    newer: Any = None
    picks: list[Any] = []
    while True:
        gain = op.Mul(worth, left)
        picks.append(op.ArgMax(op.Round(gain) if exact else gain, axis=2, keepdims=0))  # [B,1]
        if len(picks) == keep:
            return op.Concat(*picks, axis=1)
        place = op.Unsqueeze(picks[-1], _axes(op, 2))
        line = op.Cast(op.Gather(rows, op.Add(picks[-1], first), axis=0), to=weights.dtype)
        for lines, length in ((older, _full(len(picks) - 1)), (newer, (len(picks) - 1) % PART)):
            if length:
                own = op.GatherElements(lines, op.Expand(place, _axes(op, 1, length, 1)), axis=2)
                line = op.Sub(line, op.MatMul(op.Reshape(own, _axes(op, -1, 1, length)), lines))
        rest = op.GatherElements(left, place, axis=2)
        line = op.Where(op.Greater(rest, number[2]), op.Div(line, op.Sqrt(rest)), number[4])
        newer = line if newer is None else op.Concat(newer, line, axis=1)
        if len(picks) % PART == 0:
            older, newer = newer if older is None else op.Concat(older, newer, axis=1), None
        left = op.Max(op.Sub(left, op.Mul(line, line)), number[2])
        worth = op.ScatterElements(worth, place, gone, axis=2)


def _full(length: int) -> int:
    return length - length % PART


# -- what the graphs need ------------------------------------------------------------------------------------


def _number(op: Any, value: float) -> Any:
    return op.Constant(value_float=value)


def _axes(op: Any, *axes: int) -> Any:
    return op.Constant(value_ints=list(axes))


def _batch(op: Any, table: Any) -> Any:
    """The batch size, int64 [1]."""
    return op.Shape(table, start=0, end=1)


def _diagonal(op: Any, count: int) -> Any:
    """Bool [count,count], true where row and column are the same token; made when run: N numbers on disk."""
    places = op.Constant(value_ints=list(range(count)))
    return op.Equal(op.Unsqueeze(places, _axes(op, 1)), places)


def _lines(op: Any, table: Any, likeness: Any) -> tuple[Any, Any]:
    """All lines of table [B,N,N] as [B·N,N], and the number of each picture's first line, int64 [B,1].

    `likeness` is of the table's shape, and knows it.
    """
    batch, count = likeness.shape[:2]
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    pictures = op.Range(zero, op.Squeeze(_batch(op, table)), one)
    first = op.Mul(op.Unsqueeze(pictures, _axes(op, 1)), _axes(op, count))
    return op.Reshape(table, _axes(op, -1, count)), ops.sized(first, "INT64", batch, 1)
