"""Attention that kept visual tokens would have drawn with the dropped ones: a bias that lies in the cache.

Source: arXiv 2606.01711. Of N visual tokens K are kept, each of which stands for N/K: log(N/K) is added to
the attention logits of their keys, in the prompt and in every step after it.

Queries and keys get a few columns more, after the rotary embedding: a query has 1 in the first of them, a key
the bias divided by the scale, so that their product is what it was plus the bias. A key keeps that in the
cache, so steps feed nothing, and every attention operator of every target serves. Values get columns of 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

COLUMNS = 8  # more of every head: GroupQueryAttention wants heads of a multiple of 8


def biased(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """query [B,H,S,d], key and value [B,G,S,d] with COLUMNS more.

    Products of queries and keys, times `scale`, gain key_bias float32 [B,S] of the keys.
    """
    first = functional.pad(torch.ones(1, dtype=query.dtype), (query.shape[-1], COLUMNS - 1))
    extra = (key_bias / scale).to(key.dtype).unsqueeze(1).unsqueeze(3)
    query, key, value = (functional.pad(rows, (0, COLUMNS)) for rows in (query, key, value))
    return query + first, key + extra * first, value


def bias_of(count: int, keep: int) -> float:
    """What a kept token's logits gain: log(N/K)."""
    return math.log(count / keep)


class UnbiasedTokens(nn.Module):
    """input_ids int64 [B,T] -> what `embed` gives, and key_bias float32 [B,T] of text: 0."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(input_ids), (input_ids * 0).float()


class BiasingSplice(nn.Module):
    """As `splice`, and prompt_bias float32 [B,S]: log(N/M) where one of M visual tokens stands, else 0.

    It is the splice itself of one column, in which text is 0 and a visual token its bias.
    """

    def __init__(self, splice: Any, count: int) -> None:
        super().__init__()
        self.splice, self.count, self.reads_keep = splice, count, splice.reads_keep

    def forward(self, inputs_embeds: Tensor, image_embeds: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        text, visual = (
            torch.zeros_like(rows[..., :1], dtype=torch.float32) for rows in (inputs_embeds, image_embeds)
        )
        kept = (visual[:1] + 1).sum(dim=1, keepdim=True)  # M, [1,1,1]
        bias, *_ = self.splice(text, visual + torch.log(self.count / kept), *others)
        return *self.splice(inputs_embeds, image_embeds, *others), bias.squeeze(2)
