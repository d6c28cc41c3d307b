"""SparseVLM (arXiv 2410.04417), in its second form (SparseVLM+): what the words of the question look at.

Sites: after decoder layers 2, 6 and 15 of 32 (sites decoder:3, 7 and 16), scaled to the model's depth. Inputs
at a site L, for the N visual tokens that arrive there: text_attention [B,H,R,N], the rows of the R text
tokens in layer L-1; text_gravity [B,R,N], what the rotary embedding alone would make of those rows;
image_embeds [B,M,D] (all M of the picture) and text_embeds [B,R,D], as they entered the decoder; text_mask
[B,R], which text follows the picture. Option: heads, the number of priority heads (0: 7/16 of them, 14 of 32
as published). Default K: 118 of 576, the last count of the published list for 192.

1. Raters, the same at every site: a visual token deals 1 out to the text after the picture by the softmax of
   their dot products; the text tokens that get more than the mean are raters.
2. Attention is divided by the gravity of its positions; of every head the sum over raters and visual tokens
   is taken, and the `heads` largest are the priority heads.
3. The tokens with the largest attention of the raters in those heads are kept.

Published lists of counts for the three sites are {192: [300, 200, 118], 128: [238, 108, 60], 96: [246, 54,
28], 64: [66, 34, 20]} of 576, named by their mean over the layers. K is the last count; the first two are
interpolated between those lists by K, and between them and (0, 0) below or (576, 576) above, rounded down and
at least K.

Departures from the published code:
- A text token rates if it gets 2^-16 more than the mean, so that rounding chooses no raters among equals; if
  none does, all text after the picture rates (all text, if none follows), where the code's scores are NaN.
- The code has 14 heads whatever the model's number; a site always drops a token, where K = N keeps them all.
- A gravity of exactly 0 counts as 1 instead of dividing by it. A negative one turns the sign, as in the code.
- Sums do for the means, whose divisors change no order. Scores are float32; equal ones go to the lower index.
- The first form's merging of dropped tokens and its counts by rank are not offered. Kept tokens keep their
  positions, as in the code's second form.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner

DEPTH, PLACES = 32, (3, 7, 16)  # of LLaVA-1.5-7B
COUNT = 576
LISTS = ((0, 0, 0), (66, 34, 20), (246, 54, 28), (238, 108, 60), (300, 200, 118), (576, 576, 576))
MORE = 1 + 2.0**-16  # than the mean: what makes a rater


class SparseVLM(Pruner):
    """Keeps, at each of three sites, the tokens that the words of the question attend to."""

    name = "sparsevlm"
    site = "decoder"
    needs = ("text_attention", "text_gravity", "image_embeds", "text_embeds", "text_mask")
    options: ClassVar[dict[str, Any]] = {"heads": 0}
    paper = "arXiv 2410.04417"

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        if self.settings["heads"] < 0:
            raise UsageError(f"method sparsevlm: heads {self.settings['heads']} is negative")

    @classmethod
    def default_keep(cls, count: int) -> int:
        """118 of 576, as in the list that the published code takes if no other is named."""
        return max(1, count * 118 // COUNT)

    @classmethod
    def sites(
        cls, layers: int, count: int, keep: int, settings: Mapping[str, Any]
    ) -> tuple[tuple[int, int], ...]:
        """(layer, tokens kept before it) at 3/32, 7/32 and 16/32 of `layers`; the last keeps `keep`."""
        if layers <= len(PLACES):
            raise UsageError(f"method sparsevlm needs a decoder of at least 4 layers, not {layers}")
        return tuple(zip(places(layers), schedule(count, keep), strict=True))

    def forward(  # type: ignore[override]
        self,
        text_attention: Tensor,
        text_gravity: Tensor,
        image_embeds: Tensor,
        text_embeds: Tensor,
        text_mask: Tensor,
    ) -> Tensor:
        """[B,H,R,N], [B,R,N], [B,M,D], [B,R,D], [B,R] -> keep_indices [B,K]."""
        rating = raters(image_embeds, text_embeds, ops.question(text_mask))
        gravity = torch.where(text_gravity == 0, 1.0, text_gravity.float())
        weights = (rating.unsqueeze(2) / gravity).unsqueeze(1)
        heads = (text_attention.float() * weights).sum(dim=2)  # [B,H,N]
        priority = ops.top_k(heads.sum(dim=2), self.priority_heads(heads.shape[1]))
        return ops.raster(ops.top_k(ops.gather_rows(heads, priority).sum(dim=1), self.keep))

    def priority_heads(self, heads: int) -> int:
        """How many of `heads` speak."""
        return min(self.settings["heads"] or max(1, heads * 14 // 32), heads)


def raters(image_embeds: Tensor, text_embeds: Tensor, asked: Tensor) -> Tensor:
    """Which text [B,R,D] rates the picture [B,M,D]: float32 [B,R], 1 or 0; only where asked [B,R] is 1."""
    products = torch.matmul(image_embeds.float(), text_embeds.float().transpose(1, 2))
    dealt = torch.softmax(torch.where(asked.unsqueeze(1) > 0, products, -torch.inf), dim=2)
    share = dealt.mean(dim=1) * asked.sum(dim=1, keepdim=True)  # 1 in the mean
    rating = (share > MORE).float()
    return torch.where(rating.sum(dim=1, keepdim=True) > 0, rating, asked)


def places(layers: int) -> list[int]:
    """The published sites scaled to `layers`: strictly ascending, the last below `layers`."""
    scaled: list[int] = []
    for left, place in zip((2, 1, 0), PLACES, strict=True):
        nearest = (2 * place * layers + DEPTH) // (2 * DEPTH)
        scaled.append(min(max(nearest, scaled[-1] + 1 if scaled else 1), layers - 1 - left))
    return scaled


def schedule(count: int, keep: int) -> tuple[int, int, int]:
    """Tokens left after each site for `keep` of `count` in the end, between the published lists."""
    scaled = keep * COUNT  # keep / count * COUNT, times count: whole numbers throughout
    below, above = next(pair for pair in pairwise(LISTS) if scaled <= pair[1][2] * count)
    gap = above[2] - below[2]
    one, two = (
        # low + (high - low) * (K' - low K) / gap for K' = scaled / count; then scaled back from COUNT.
        (low * gap * count + (high - low) * (scaled - below[2] * count)) // (gap * COUNT)
        for low, high in zip(below[:2], above[:2], strict=True)
    )
    two = max(two, keep)
    return max(one, two), two, keep
