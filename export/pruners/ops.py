"""Tensor pieces that pruners share, exportable as standard ONNX ops with static shapes.

Ties go to the lower index everywhere. `torch.topk` does not promise that, ONNX TopK does, so `top_k`
is a custom operator: a stable sort under torch, one TopK node in the graph. A method may bring such an
operator of its own: `translates` says how it is written in ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Translation = Callable[..., Any]

PART = 128  # least number of rows in a part of a matrix product: smaller ones waste a CPU's width

_NEWEST = 23  # of the opsets that translations are written for
_OPSET: ContextVar[int] = ContextVar("opset", default=_NEWEST)
_TRANSLATIONS: dict[Callable[..., Any], Translation] = {}


def translates(operator: Callable[..., Any]) -> Callable[[Translation], Translation]:
    """Decorate the ONNX translation of a custom operator (`torch.ops.vtp.<name>.default`)."""

    def register(translation: Translation) -> Translation:
        _TRANSLATIONS[operator] = translation
        return translation

    return register


def onnx_translations() -> dict[Callable[..., Any], Translation]:
    """The `custom_translation_table` that `torch.onnx.export` needs for these operators."""
    return dict(_TRANSLATIONS)


@torch.library.custom_op("vtp::top_k", mutates_args=())
def _top_k(scores: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(scores, dim=-1, descending=largest, stable=True)
    return values[..., :k].clone(), indices[..., :k].clone()


@_top_k.register_fake
def _(scores: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    shape = (*scores.shape[:-1], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


def onnx_ops() -> Any:
    """The ONNX operators a translation is written with (onnxscript's; loaded when exporting)."""
    import onnxscript

    return getattr(onnxscript, f"opset{_OPSET.get()}")


@contextmanager
def translating(opset: int) -> Iterator[None]:
    """Let translations use the operators of `opset`, or of 23 where that is newer."""
    token = _OPSET.set(min(opset, _NEWEST))
    try:
        yield
    finally:
        _OPSET.reset(token)


def sized(value: Any, dtype: Any, *sizes: Any) -> Any:
    """Say a value's dtype ("INT64", or another value's) and shape where an engine cannot tell; returns it.

    For translations that unroll. ONNX Runtime plans memory by comparing the shapes of freed buffers: if it
    takes the batch for another one in each of thousands of nodes, no buffer is used twice, and opening the
    graph takes a time that grows with their square (19 s for 7,800 nodes, with shapes below 1 s).
    """
    import onnx_ir as ir

    value.dtype = ir.DataType[dtype] if isinstance(dtype, str) else dtype
    value.shape = ir.Shape(sizes)
    return value


@translates(torch.ops.vtp.top_k.default)
def _(scores: Any, k: int, largest: bool) -> Any:
    op = onnx_ops()
    return op.TopK(scores, op.Constant(value_ints=[k]), axis=-1, largest=int(largest), sorted=1)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [B,k] of the k largest of scores [B,N], largest first, ties by lower index."""
    return torch.ops.vtp.top_k(scores, k, True)[1]


def raster(indices: Tensor) -> Tensor:
    """Sort indices [B,K] ascending: the order in which the tokens lie in the picture.

    Indices pass through float32 (exact below 2**24), which every engine's TopK accepts.
    """
    ordered, _ = torch.ops.vtp.top_k(indices.float(), indices.shape[-1], False)
    return ordered.to(torch.int64)


def gather_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """Pick rows [B,N,C] by indices [B,K] -> [B,K,C], as one flat Gather (GatherND is never emitted)."""
    batch, count, width = rows.shape
    if batch == 1:
        return functional.embedding(indices, rows[0])
    first = torch.arange(batch, dtype=torch.int64).unsqueeze(1) * count
    return functional.embedding(indices + first, rows.reshape(-1, width))


def normalize(rows: Tensor) -> Tensor:
    """L2-normalise the last axis in float32; a zero row stays zero."""
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def cosines(rows: Tensor, others: Tensor) -> Tensor:
    """Cosine of each of rows [B,N,C] to the same one of others [B,N,C], float32 [B,N]; 0 for a zero row.

    The product over the lengths: exactly 1 for equal rows, so that those tie.
    """
    one, other = rows.float(), others.float()
    lengths = ((one * one).sum(dim=2) * (other * other).sum(dim=2)).sqrt()
    return (one * other).sum(dim=2) / lengths.clamp_min(1e-12)


def by_distance(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """[N,N] of all pairs of a grid's tokens from table [N,1], indexed by |dy|·W + |dx|.

    Made when run: N values lie on disk, not N².
    """
    height, width = grid
    y = torch.arange(height).reshape(height, 1, 1, 1) - torch.arange(height).reshape(1, 1, height, 1)
    x = torch.arange(width).reshape(1, width, 1, 1) - torch.arange(width).reshape(1, 1, 1, width)
    place = (y.abs() * width + x.abs()).reshape(height * width, height * width)
    return functional.embedding(place, table).squeeze(-1)


def products(rows: Tensor) -> Tensor:
    """Dot products [B,N,N] of all pairs of rows [B,N,C].

    Every pair is multiplied once: the rows are cut into parts, and the blocks below the diagonal are those
    above it, turned. On 576 tokens that saves three eighths of the work, on 2,880 nearly half.
    """
    parts = rows.tensor_split(min(8, rows.shape[1] // PART), dim=1) if rows.shape[1] >= 2 * PART else [rows]
    blocks: dict[tuple[int, int], Tensor] = {}
    for one, upper in enumerate(parts):
        for two, lower in enumerate(parts[one:], one):
            blocks[one, two] = torch.matmul(upper, lower.transpose(1, 2))
            if two > one:
                blocks[two, one] = blocks[one, two].transpose(1, 2)
    places = range(len(parts))
    return torch.cat([torch.cat([blocks[one, two] for two in places], dim=2) for one in places], dim=1)


def question(text_mask: Tensor) -> Tensor:
    """Which text counts as the question, float32 [B,R]: what follows the picture, else all of it."""
    asked = text_mask.float()
    return torch.where(asked.sum(dim=1, keepdim=True) > 0, asked, 1.0)
