"""Decoder attention in standard ONNX operators on a cache of fixed size: for engines without GQA (TensorRT).

New keys and values are written into the cache, then attention looks at the whole cache through a mask. The
mask is explicit: how `is_causal` is aligned when a cache is longer than the queries is told differently by
engines. The graph's inputs are those of GroupQueryAttention, so that a runtime feeds both alike, and batches
are right-padded alike. FIXED_CACHE does it with the operators of opset 24, `decomposed.py` with older ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vtp.export.graphs.attention.operators import (
    Attend,
    Attending,
    Lengths,
    Look,
    Rule,
    TowerAttend,
    softcapped,
)
from vtp.export.onnx.emit import GraphInput, GraphSpec

OPSET = 24  # of TensorScatter


# How new keys or values [B,G,S,d] come into a cache [B,G,C,d] from the places int64 [B] on.
Write = Callable[[Tensor, Tensor, Tensor], Tensor]


def on_fixed_cache(write: Write, attend: TowerAttend) -> Attend:
    """Attention on a cache that `write` fills and `attend` looks at, see `look_at`."""
    look = look_at(attend)

    def attention_on_cache(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past: tuple[Tensor, Tensor],
        lengths: Lengths,
        rule: Rule,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """query [B,H,S,d], key, value [B,G,S,d], past [B,G,C,d] twice -> output [B,S,H,d], the new cache."""
        start = first_places(lengths, query.shape[2])
        keys, values = (write(cache, new, start) for cache, new in zip(past, (key, value), strict=True))
        return look(query, (keys, values), lengths, rule), (keys, values)

    return attention_on_cache


def look_at(attend: TowerAttend) -> Look:
    """Attention with `attend` to a cache that is filled already.

    Where logits are bent it is decomposed: versions of the operator differ in whether that comes before the
    mask, as it should.
    """

    def attention_to_cache(
        query: Tensor, present: tuple[Tensor, Tensor], lengths: Lengths, rule: Rule
    ) -> Tensor:
        """query [B,H,S,d], present [B,G,C,d] twice -> output [B,S,H,d]."""
        keys, values = present
        place = first_places(lengths, query.shape[2]).unsqueeze(1) + torch.arange(query.shape[2])
        mask = lengths.seen(place, keys.shape[2], rule, lengths.lookahead).unsqueeze(1)
        if rule.softcap is None:
            output = attend(query, keys, values, mask, rule.scale)
        else:
            output = decomposed(query, keys, values, mask, rule.scale, rule.softcap)
        return output.transpose(1, 2)

    return attention_to_cache


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention where TensorRT has a kernel for it, else the products and the softmax that it is made of.

    query [B,H,S,d], key and value [B,G,C,d], mask bool [B,1,S,C] or None -> [B,H,S,d].
    """
    if not has_kernel(query):
        return decomposed(query, key, value, mask, scale)
    return torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value) if mask is None else (query, key, value, mask),
        attrs={"scale": scale},
        dtype=query.dtype,
        shape=query.shape,
        version=OPSET,
    )


def has_kernel(query: Tensor) -> bool:
    """Half precision, heads 16 to 256 wide: what TensorRT-RTX 1.7 builds; others it refuses to decompose."""
    return query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] in range(16, 257, 8)


def decomposed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """The same in MatMul and Softmax, scores in float32; they are bent to `softcap` before they are masked.

    The queries of a group follow each other along one axis, so that keys are never repeated.
    """
    batch, heads, sequence, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(batch, groups, heads // groups * sequence, width)
    scores = softcapped(torch.matmul(grouped, key.transpose(2, 3)).float() * scale, softcap)
    if mask is not None and mask.is_floating_point():  # a tower's: groups are heads
        scores = scores + mask.float()
    elif mask is not None:
        apart = scores.reshape(batch, groups, heads // groups, sequence, key.shape[2])
        hidden = apart.masked_fill(~mask.unsqueeze(1), torch.finfo(torch.float32).min)
        scores = hidden.reshape(scores.shape)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return torch.matmul(weights, value).reshape(batch, heads, sequence, width)


def first_places(lengths: Lengths, sequence: int) -> Tensor:
    """Where in the cache each row's first token of this run goes, int64 [B].

    A run on an empty cache starts at 0, also in rows that are shorter than the longest; a later run
    has the same number of tokens in every row.
    """
    later = lengths.seqlens_k.to(torch.int64) + 1 - sequence
    return torch.where(lengths.fresh(sequence), torch.zeros_like(later), later)


def _scatter(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        "TensorScatter",
        (cache, new, start),
        attrs={"axis": 2},
        dtype=cache.dtype,
        shape=cache.shape,
        version=OPSET,
    )


FIXED_CACHE = Attending(on_fixed_cache(_scatter, attention), attention, look=look_at(attention))


def fix_capacity(spec: GraphSpec, capacity: int) -> GraphSpec:
    """The same decoder graph with the cache's length as a constant: TensorRT wants it static."""
    return replace(spec, inputs=[_fixed(item, capacity) for item in spec.inputs])


def _fixed(item: GraphInput, capacity: int) -> GraphInput:
    if not item.name.startswith("past_key_values."):
        return item
    batch, groups, _, width = item.example.shape
    example = torch.zeros(batch, groups, capacity, width, dtype=item.example.dtype)
    return GraphInput(item.name, example, {axis: name for axis, name in item.dynamic.items() if axis != 2})
