"""CDPruner (arXiv 2506.10967): diverse tokens, where what the question is about counts most.

Site: projector, once a prompt. Inputs: image_embeds [B,N,D]; text_embeds [B,R,D] and text_mask [B,R], the
prompt's embedded text and which of it follows the picture. Option: relevance ("like" or "unlike"). Default K:
64 of 576, as in the paper's tables.

1. The relevance of a token is the cosine of its embedding and of the mean embedding of the question (the text
   after the picture; all text if none follows), brought to 0 to 1 by the picture's least and largest one.
2. With S the cosines of all pairs and q the relevances, L = q·S·q is the kernel of a determinantal point
   process. Greedily, K times, the token is kept that makes the determinant of the kept tokens' L largest:
   the one with the largest q² · (what is left of its embedding beside the span of the kept ones').

Departures from the published code:
- Its relevance compares CLIP's projected patches with CLIP's embedding of the question, a tower that
  LLaVA's checkpoints do not hold, and takes the cosine *negated*, for CLIP's patches are least like the text
  that describes them. Here both are embeddings of the decoder (as the paper does for models without that
  tower), and the more like the text the more relevant; `relevance=unlike` negates.
- The text after the picture includes the chat template's words; the published code sees the question alone.
- It adds 1e-6 to the relevances before their scaling. Here the least relevant token has 0. Relevances that
  differ by less than 2^-20 (no text, a picture of one colour) count as equal, and diversity alone decides.
- What is left of a token counts as 2^-20 if it is less: what the kept tokens span already is told apart by
  relevance alone. The published code divides by what is left, and its result is NaN once that is negative.
- Cosines are float32 whatever the model's dtype, the greedy steps over them float64, with products told
  apart to 40 binary places, so that equal tokens tie in every engine, and the lower index is kept.
  A zero embedding is similar to nothing and kept last instead of NaN.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners import greedy, ops
from vtp.export.pruners.base import Pruner

SENSES = ("like", "unlike")
EQUAL = 2.0**-20  # relevances nearer than this, as cosines, are the same


class CDPruner(Pruner):
    """Keeps K tokens that are relevant to the question and unlike each other."""

    name = "cdpruner"
    site = "projector"
    needs = ("image_embeds", "text_embeds", "text_mask")
    options: ClassVar[dict[str, Any]] = {"relevance": "like"}
    paper = "arXiv 2506.10967"

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        sense = self.settings["relevance"]
        if sense not in SENSES:
            raise UsageError(f"method cdpruner: relevance is '{sense}'; choose {' or '.join(SENSES)}")
        self.exact = True  # an engine without float64 (TensorRT) needs False
        self.sign = 1 if sense == "like" else -1

    def forward(self, image_embeds: Tensor, text_embeds: Tensor, text_mask: Tensor) -> Tensor:  # type: ignore[override]
        """image_embeds [B,N,D], text_embeds [B,R,D], text_mask [B,R] -> keep_indices [B,K]."""
        rows = ops.normalize(image_embeds)
        quality = self.relevance(rows, text_embeds, ops.question(text_mask))
        present = rows.abs().amax(dim=2) > 0
        weights = torch.where(present, quality, 0.0).to(torch.float64 if self.exact else torch.float32)
        return ops.raster(greedy.volume(ops.products(rows), weights * weights, self.keep))

    def relevance(self, rows: Tensor, text_embeds: Tensor, asked: Tensor) -> Tensor:
        """How much unit rows [B,N,D] are like the mean of text [B,R,D] where asked [B,R]: [B,N], 0 to 1."""
        # The sum does for the mean: its length is divided out.
        question = torch.matmul(asked.unsqueeze(1), text_embeds.float())
        alike = torch.matmul(rows, question.transpose(1, 2)).squeeze(2) * self.sign
        least = alike.amin(dim=1, keepdim=True)
        span = alike.amax(dim=1, keepdim=True) - least
        apart = span > question.norm(dim=2) * EQUAL
        return torch.where(apart, (alike - least) / torch.where(apart, span, 1.0), 1.0)
