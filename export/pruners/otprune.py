"""OTPrune (arXiv 2602.20205): the tokens whose spread comes nearest to that of the whole picture.

Site: projector. Input: image_embeds [B,N,D]. Option: gamma, the weight of the kernel beside the identity (0:
0.01·(4096 / D)², the published 0.01 at D = 4,096, see below). Default K: 64 of 576.

1. X is image_embeds with every column of unit length; G = X·Xᵀ [N,N].
2. L = I + gamma·G·Gᵀ. Greedily, K times, the token is kept that makes the determinant of the kept tokens' L
   largest. The paper derives that from the distance (optimal transport) between the kept tokens and all of
   them, both taken for Gaussian.

G grows with D: write every column of X k times, and it is k·G, though the tokens lie as they did. The
published gamma is for embeddings 4,096 wide; with it L of narrow ones is nearly the identity, so that the
choice is by the diagonal alone, which is largest on plain ground. The default is therefore 0.01·(4096 / D)²,
with which L is the same however often columns are written (10 for the built-in model's 128).

Written as cdpruner's loop: with d the diagonal of L, the likenesses are L / sqrt(d·d) and the weights d.

Departures from the published code: gamma at other widths than 4,096. A column of zeros stays zero instead of
NaN. Products and steps are float64, with likenesses and gains told apart to 40 binary places, so that equal
tokens tie in every engine and the lower index is kept; the code computes in the model's dtype.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import greedy, ops
from vtp.export.pruners.base import Pruner

PUBLISHED, WIDTH = 0.01, 4096  # the paper's gamma, and how wide the embeddings are that it is for


class OTPrune(Pruner):
    """Keeps K tokens whose kernel has the largest determinant, token by token."""

    name = "otprune"
    site = "projector"
    needs = ("image_embeds",)
    options: ClassVar[dict[str, Any]] = {"gamma": 0.0}
    paper = "arXiv 2602.20205"

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        gamma = self.settings["gamma"]
        if not 0 <= gamma <= 1000:
            raise UsageError(
                f"method otprune: gamma {gamma} is outside 0 to 1000, the kernel's weight (0: by the width)"
            )
        self.exact = True  # an engine without float64 (TensorRT) needs False

    def forward(self, image_embeds: Tensor) -> Tensor:  # type: ignore[override]
        """image_embeds [B,N,D] -> keep_indices [B,K]."""
        likeness, weights = self.kernel(image_embeds)
        return ops.raster(greedy.volume(likeness, weights, self.keep))

    def kernel(self, image_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """L of embeddings [B,N,D] as likenesses [B,N,N] with ones on the diagonal, and its diagonal [B,N].

        The diagonal is scaled to at most 1, which changes no choice.
        """
        rows = image_embeds.to(torch.float64 if self.exact else torch.float32)
        gram = ops.products(rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12))
        added = ops.products(gram) * (self.settings["gamma"] or PUBLISHED * (WIDTH / rows.shape[-1]) ** 2)
        places = torch.arange(self.count) * (self.count + 1)
        diagonal = added.flatten(1).index_select(1, places) + 1
        root = diagonal.sqrt()
        likeness = added / (root.unsqueeze(1) * root.unsqueeze(2))
        if self.exact:
            likeness = torch.round(likeness * greedy.GRAIN) / greedy.GRAIN
        return likeness, diagonal / diagonal.amax(dim=1, keepdim=True)
