"""What a decoder layer's tokens see: the rule of the layer, and where the rows of a batch end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """What a decoder layer makes of the products of its queries and keys.

    scale     the products are multiplied by it
    softcap   and then bent to stay within -softcap to softcap; None: not bent
    window    a token sees the last `window` tokens, itself among them; None: all of them
    """

    scale: float
    softcap: float | None = None
    window: int | None = None

    def bend(self, products: Tensor) -> Tensor:
        """Products -> attention logits, float32."""
        return softcapped(products.float() * self.scale, self.softcap)


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits within -softcap to softcap; as they are for None."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


@dataclass
class Lengths:
    """Where the rows of a batch end, in GroupQueryAttention's terms, and how far its tokens see.

    seqlens_k int32 [B]: valid tokens in the cache after this run, minus one.
    total_sequence_length int32 []: the longest row after this run.
    lookahead int64 [B,S]: how many tokens after itself each token of this run sees, up to the row's end.
    None: a token sees itself and those before it.
    windows: whether sliding windows are kept to; they need not be where no cache is longer than a window.
    near: whether only layers with a window look ahead.
    key_bias float32 [B,S]: added to the logits of this run's keys, now and in later runs; None: nothing.
    """

    seqlens_k: Tensor
    total_sequence_length: Tensor
    lookahead: Tensor | None = None
    windows: bool = False
    near: bool = False
    key_bias: Tensor | None = None

    def of(self, rule: Rule) -> Lengths:
        """These for a layer of that rule."""
        return replace(self, lookahead=None) if self.near and rule.window is None else self

    def last_index(self, sequence: int) -> Tensor:
        """Index int64 [B] of every row's last real token among the `sequence` tokens of this run."""
        past = self.total_sequence_length.to(torch.int64) - sequence
        return (self.seqlens_k.to(torch.int64) - past).clamp(0, sequence - 1)

    def fresh(self, sequence: int) -> Tensor:
        """Whether this run of `sequence` tokens is on an empty cache, bool []."""
        return self.total_sequence_length.to(torch.int64) == sequence

    def seen(self, place: Tensor, columns: int, rule: Rule, lookahead: Tensor | None) -> Tensor:
        """Which of the cache's first `columns` places tokens at `place` int64 [B,R] see: bool [B,R,columns].

        `lookahead` int64 [B,R] is those tokens' own. Padding after a row's end sees what the row's last token
        sees, so that no row of the answer is empty.
        """
        column = torch.arange(columns)
        if lookahead is None and rule.window is None:
            return column <= place.unsqueeze(2)
        end = self.seqlens_k.to(torch.int64).unsqueeze(1)
        place = torch.minimum(place, end)
        reach = place if lookahead is None else torch.minimum(place + lookahead, end)
        near = column <= reach.unsqueeze(2)
        return near if rule.window is None else near & (column > place.unsqueeze(2) - rule.window)
