"""Random choice: the baseline that every method has to beat, and surprisingly strong.

Site: vision. Input: image_features [B,N,C], read for its batch size only.
Option: seed (0). Default K: 64 of 576 tokens.

The choice is drawn at export and baked into the graph: within a bundle every picture keeps the same K
places, and another seed gives another bundle. So a result is repeatable on every engine, and no engine
needs random numbers; an average over seeds takes several bundles. With one seed a smaller K keeps
a subset of what a larger K keeps.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vtp.engines.errors import UsageError
from vtp.export.pruners.base import Pruner


class Random(Pruner):
    """Keeps the first K of a seeded permutation of the N places."""

    name = "random"
    site = "vision"
    needs = ("image_features",)
    options: ClassVar[dict[str, Any]] = {"seed": 0}

    chosen: Tensor

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        seed = self.settings["seed"]
        if seed < 0:
            raise UsageError(f"method random: seed {seed} is negative; choose 0 or more")
        chosen = np.sort(np.random.default_rng(seed).permutation(self.count)[:keep])
        self.register_buffer("chosen", torch.from_numpy(chosen.astype(np.int64)).unsqueeze(0))

    def forward(self, image_features: Tensor) -> Tensor:  # type: ignore[override]
        """image_features [B,N,C] -> keep_indices [B,K], the same for every row."""
        return self.chosen.expand(image_features.shape[0], -1)
