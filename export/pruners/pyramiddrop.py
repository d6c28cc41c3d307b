"""PyramidDrop (arXiv 2410.17247): fewer tokens the deeper the decoder, ranked by what is asked.

Sites: before the decoder layers at 1/4, 1/2 and 3/4 of the depth (8, 16 and 24 of 32). Input: next_scores
[B,N], the mean over heads of the last prompt token's row in the layer that is about to run, cut to the visual
tokens that arrive. Default K: an eighth of the tokens, 72 of 576.

Each site keeps the top of the scores: a half, a quarter, then an eighth of all tokens, as published. For
another K the counts fall by a constant factor from N to K over the three sites, rounded down. As a second
cut (`--then pyramiddrop`) it has one site: VScan's decoder half (arXiv 2505.22654), which is this choice.

Departures from the published code: kept tokens keep their original positions, where it numbers the sequence
anew after each site; scores stay float32 where it rounds them to the model's dtype; equal scores go to the
lower index. The paper also trains with pruning, which no export needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner

STAGES = 4  # equal parts of the decoder; a site between each two


class PyramidDrop(Pruner):
    """Keeps, at each of three sites, the tokens that the last prompt token is about to look at most."""

    name = "pyramiddrop"
    site = "decoder"
    needs = ("next_scores",)
    paper = "arXiv 2410.17247"

    @classmethod
    def default_keep(cls, count: int) -> int:
        """An eighth of the N = `count` tokens, as in the paper."""
        return max(1, count // 8)

    @classmethod
    def sites(
        cls, layers: int, count: int, keep: int, settings: Mapping[str, Any]
    ) -> tuple[tuple[int, int], ...]:
        """(layer, tokens kept before it) at 1/4, 1/2 and 3/4 of `layers`; the last count is `keep`."""
        if layers < STAGES:
            raise UsageError(f"method pyramiddrop needs a decoder of at least {STAGES} layers, not {layers}")
        places = (layers * stage // STAGES for stage in range(1, STAGES))
        return tuple(zip(places, schedule(count, keep), strict=True))

    def forward(self, next_scores: Tensor) -> Tensor:  # type: ignore[override]
        """next_scores [B,N] -> keep_indices [B,K]."""
        return ops.raster(ops.top_k(next_scores.float(), self.keep))


def schedule(count: int, keep: int) -> tuple[int, int, int]:
    """Tokens left after each site, from `count` down to `keep`: halves for an eighth, else geometric."""
    if keep == count // 8:
        return count // 2, count // 4, keep
    return cube_root(count * count * keep), cube_root(count * keep * keep), keep


def cube_root(number: int) -> int:
    """The largest whole number whose cube is at most `number`."""
    root = round(number ** (1 / 3))
    return root - 1 if root**3 > number else root
