"""Focal as plain loops over one picture; see numpy_pruners.py for what the two numbers mean.

Single steps are float32 where engines take them so: on inputs whose sums of products are exact, every number
here then equals theirs and ties stay ties.
"""

from __future__ import annotations

import math

import numpy as np

from .numpy_pruners import Chosen


def focal(
    grid: tuple[int, int],
    keep: int,
    image_features: np.ndarray,
    attention_scores: np.ndarray,
    reach: float = 1.0,
) -> Chosen:
    """The highest score is kept and lowers the others; the margin is relative to it."""
    count = grid[0] * grid[1]
    sigma = reach * math.sqrt(count / keep)
    rows = image_features.astype(np.float64)
    rows = [count * row - rows.sum(axis=0) for row in rows]
    length = [np.float32(max(math.sqrt(math.fsum(row * row)), 1e-12)) for row in rows]
    scores = {place: np.float32(score) for place, score in enumerate(attention_scores)}
    kept: list[int] = []
    margin = math.inf
    while len(kept) < keep:
        best = min(scores, key=lambda place: (-scores[place], place))
        high = scores.pop(best)
        lower = [float(high - score) for score in scores.values() if score < high]
        if high > 0 and lower:
            margin = min(margin, min(lower) / float(high))
        kept.append(best)
        for place, score in scores.items():
            product = np.float32(math.fsum(rows[best] * rows[place]))
            likeness = min(max(product / (length[best] * length[place]), np.float32(-1)), np.float32(1))
            dy, dx = place // grid[1] - best // grid[1], place % grid[1] - best % grid[1]
            near = np.float32(math.exp(-(dy * dy + dx * dx) / (2 * sigma**2)) / 2)
            scores[place] = score * (np.float32(1) - near * (np.float32(1) + likeness))
    return sorted(kept), margin
