"""GroupQueryAttention under a mask, for decoders whose tokens do not just see all before them.

ONNX Runtime's operator takes `causal=0`, and then what a token sees is told by its attention bias alone. It
writes the new keys and values where they belong and reads the filled part of the cache, as without a mask;
`decomposed.MASKED`, for versions before `engines.graph.masks.SINCE`, reads the whole cache. Heads share one
mask [B,1,S,T], where T is the longest row's tokens after the run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtp.export.graphs.attention.fixed_cache import decomposed, first_places, look_at
from vtp.export.graphs.attention.operators import (
    Attending,
    Lengths,
    Rule,
    fused_attention,
    grouped_query_attention,
)


def masked_query_attention(
    query: Tensor, key: Tensor, value: Tensor, past: tuple[Tensor, Tensor], lengths: Lengths, rule: Rule
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Emit GroupQueryAttention, with a mask where it is needed; see `operators.Attend`."""
    if lengths.lookahead is None and rule.window is None:
        return grouped_query_attention(query, key, value, past, lengths, rule)
    bias = _bias(query, lengths, rule)
    return grouped_query_attention(query, key, value, past, lengths, rule, bias)


def _bias(query: Tensor, lengths: Lengths, rule: Rule) -> Tensor:
    """[B,1,S,T], added to the logits once they are bent: 0 for what a token sees, else the least number."""
    sequence = query.shape[2]
    total: Any = lengths.total_sequence_length.item()  # while it is traced a symbol
    torch._check(total >= 2)  # for the tracer: an axis that is never 1; a bundle's prompts are longer
    place = first_places(lengths, sequence).unsqueeze(1) + torch.arange(sequence)
    seen = lengths.seen(place, total, rule, lengths.lookahead)
    return torch.where(seen, 0.0, torch.finfo(query.dtype).min).to(query.dtype).unsqueeze(1)


MASKED_QUERY = Attending(masked_query_attention, fused_attention, look=look_at(decomposed))
