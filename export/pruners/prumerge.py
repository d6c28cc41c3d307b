"""PruMerge+ (LLaVA-PruMerge, arXiv 2403.15388): attended and sampled tokens, each with its neighbours added.

Site: vision; merges. Inputs: image_features [B,N,C], before the projector and without CLS; attention_scores
[B,N], the mean over heads of the CLS query's row (or of the attention received, in towers without CLS);
vision_keys [B,N,C], the keys of the layer that makes the features, heads side by side. Options: sampled
(0.5), the share of evenly spaced tokens; neighbours (32), of each kept token. Default K: 144 of 576, what the
published code's fixed form keeps at its ratio of 1/8.

1. K - floor(K·sampled) tokens with the highest attention, and floor(K·sampled) evenly spaced in raster order,
   are kept. Where the two coincide, the next in attention take the places left.
2. A kept token's neighbours are the 32 other tokens whose keys have the highest cosine with its own: kept
   ones among them, as in the code, where the paper's abstract speaks of pruned ones.
3. Its row is its own features plus the sum of its neighbours', each times its attention. The weights do not
   add up to one: attention is a share of the whole picture, so that this sum is small.

keep_indices are the places of the kept tokens.

The published code has two forms: the adaptive one lets the number of tokens follow the picture, by counting
outliers of the attention, and samples about three for each of them (`sampled=0.75`); the fixed one, used for
training, samples as many as it attends to. This is the fixed one.

Departures from the published code: it appends one more token, the sum of all pruned ones times their
attention; here exactly K come out, each standing for a patch. It takes attention and keys from the last layer
and computes the attention as if the layer had a single head; here they are those of the layer that makes
the features, heads as trained. Where a sampled token is also attended to, it passes it on twice. It passes
attended tokens on first, then sampled ones; here all are in raster order. It asks for 32 neighbours of any
picture; here at most all other tokens. Cosines and sums are float32 whatever the model's dtype, and ties go
to the lower place.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import merge, ops
from vtp.export.pruners.base import Pruner


class PruMerge(Pruner):
    """Keeps attended and evenly spaced tokens and adds to each what its neighbours were attended to."""

    name = "prumerge"
    site = "vision"
    needs = ("image_features", "attention_scores", "vision_keys")
    options: ClassVar[dict[str, Any]] = {"sampled": 0.5, "neighbours": 32}
    merges = True
    paper = "arXiv 2403.15388"

    sample: Tensor

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        share, neighbours = self.settings["sampled"], self.settings["neighbours"]
        if not 0 <= share <= 1:
            raise UsageError(
                f"method prumerge: sampled {share} is outside 0 to 1, the share of spaced tokens"
            )
        if neighbours < 0:
            raise UsageError(f"method prumerge: neighbours {neighbours} is negative; choose 0 or more")
        sampled = int(keep * share)
        self.attended = keep - sampled
        self.neighbours = min(neighbours, self.count - 1)
        sample = torch.zeros(self.count, dtype=torch.bool)
        sample[centres(self.count, sampled)] = True
        self.register_buffer("sample", sample)

    @classmethod
    def default_keep(cls, count: int) -> int:
        """A quarter: 144 of LLaVA's 576."""
        return max(1, count // 4)

    def forward(  # type: ignore[override]
        self, image_features: Tensor, attention_scores: Tensor, vision_keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """image_features, vision_keys [B,N,C], attention_scores [B,N] -> keep_indices [B,K], rows [B,K,C]."""
        scores = attention_scores.float()
        keep = self.choose(scores)
        rows = ops.gather_rows(image_features, keep)
        if self.neighbours == 0:
            return keep, rows
        near = merge.nearest_others(ops.normalize(vision_keys), keep, self.neighbours)
        added = merge.weighted_sums(near * scores.unsqueeze(1), image_features)
        return keep, (rows.float() + added).to(image_features.dtype)

    def choose(self, scores: Tensor) -> Tensor:
        """keep_indices [B,K] from scores [B,N]: the attended, the sampled, and who is next in attention."""
        wanted = scores.masked_fill(self.sample, torch.inf)
        if self.attended:
            attended = ops.top_k(scores, self.attended)
            wanted = wanted.scatter(1, attended, torch.full_like(attended, torch.inf, dtype=torch.float32))
        return ops.raster(ops.top_k(wanted, self.keep))


def centres(count: int, wanted: int) -> list[int]:
    """The middles of `wanted` equal runs of `count` places."""
    return [(2 * run + 1) * count // (2 * wanted) for run in range(wanted)]
