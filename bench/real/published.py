"""Figures that papers give for LLaVA-1.5-7B, each as it was read in the source that is named with it.

A cell that could not be read is None. AdaptPrune's paper (arXiv 2503.08019) gives shares of tokens, not these
counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

MODEL = "LLaVA-1.5-7B"
SETS = ("gqa", "pope", "textvqa")
SOURCES = {
    "R": "Cho et al., Improving Visual Token Reduction via Rectifying Distortions (RESTORE, ICML 2026, "
    "arXiv 2606.01711), Table 1: every method run again by its authors",
    "S": "Ou et al., When Vision Becomes Text (SIEVE, 2026), Table 1",
}
_OURS = re.compile(r"llava-(v?)1\.5-7b", re.IGNORECASE)


@dataclass(frozen=True)
class Published:
    """Percent of one method at one keep-count: GQA accuracy, POPE's mean F1, TextVQA's soft accuracy."""

    source: str
    method: str
    keep: int
    gqa: float | None
    pope: float | None
    textvqa: float | None

    def of(self, name: str) -> float | None:
        """The figure of a set, by its name."""
        return {"gqa": self.gqa, "pope": self.pope, "textvqa": self.textvqa}[name]


def published_for(model: str) -> Sequence[Published]:
    """What is published for a model, by its name: of other models than LLaVA-1.5-7B nothing."""
    return PUBLISHED if _OURS.search(model) else ()


PUBLISHED = (
    Published("R", "none", 576, 61.9, 85.9, 58.2),
    Published("R", "fastv", 192, 57.1, 75.8, 57.8),
    Published("R", "pyramiddrop", 192, 58.0, 84.0, 57.1),
    Published("R", "sparsevlm", 192, 59.5, 85.4, 57.7),
    Published("R", "visionzip", 192, 59.2, 85.2, 55.8),
    Published("R", "divprune", 192, 58.9, 86.5, 55.7),
    Published("R", "vispruner", 192, 59.4, 86.0, 57.7),
    Published("R", "holov", 192, 58.6, 85.0, 55.8),
    Published("R", "fastv", 128, 54.1, 68.3, 56.3),
    Published("R", "pyramiddrop", 128, 51.6, 67.8, 52.6),
    Published("R", "sparsevlm", 128, 58.4, 85.0, 56.6),
    Published("R", "visionzip", 128, 58.5, 83.2, 55.6),
    Published("R", "divprune", 128, 58.6, 86.5, 55.2),
    Published("R", "vispruner", 128, 58.1, 84.5, 56.9),
    Published("R", "holov", 128, 57.5, 82.2, 55.6),
    Published("R", "fastv", 64, 46.4, 36.1, 51.6),
    Published("R", "pyramiddrop", 64, 49.0, 55.5, 50.6),
    Published("R", "sparsevlm", 64, 53.8, 77.5, 53.5),
    Published("R", "visionzip", 64, 56.0, 78.2, 53.8),
    Published("R", "divprune", 64, 57.1, 85.3, 54.5),
    Published("R", "vispruner", 64, 55.8, 80.5, 55.6),
    Published("R", "holov", 64, 55.1, 76.8, 54.9),
    Published("S", "fastv", 192, 52.7, 64.8, 52.5),
    Published("S", "sparsevlm", 192, 59.5, 85.3, 57.8),
    Published("S", "dart", 192, 60.0, 82.8, 57.4),
    Published("S", "visionzip", 192, 59.3, 85.3, 57.3),
    Published("S", "holov", 192, 59.0, 85.6, 57.4),
    Published("S", "scope", 192, 60.1, 86.4, 57.7),
    Published("S", "fastv", 128, None, 59.6, 50.6),
    Published("S", "sparsevlm", 128, 58.4, 85.0, 56.7),
    Published("S", "dart", 128, 58.7, 80.1, 56.4),
    Published("S", "visionzip", 128, 57.6, 83.2, 56.8),
    Published("S", "holov", 128, 57.7, 84.0, 56.8),
    Published("S", "scope", 128, 59.7, 86.1, 57.2),
    Published("S", "sparsevlm", 64, 53.8, 77.5, 53.4),
    Published("S", "dart", 64, 55.9, 73.9, 54.4),
    Published("S", "visionzip", 64, 55.1, 77.0, 55.5),
    Published("S", "holov", 64, 55.3, 80.3, 55.4),
    Published("S", "scope", 64, 58.3, 83.9, 56.6),
)
