"""Methods that merge, as plain numpy loops over one picture; see numpy_pruners.py for indices and margin.

Every function returns (kept indices ascending, margin, rows [K,C] float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from .numpy_pruners import cosines, descending

Merged = tuple[list[int], float, np.ndarray]


def visionzip(
    grid: tuple[int, int],
    keep: int,
    image_features: np.ndarray,
    attention_scores: np.ndarray,
    vision_keys: np.ndarray,
    contextual: float = 0.15625,
    heads: int = 1,
) -> Merged:
    """Attended tokens, and targets that take in the mean of the others likest to them.

    One head unless told, as narrow keys have it.
    """
    features = image_features.astype(np.float64)
    keys = sum(part.astype(np.float64) for part in np.split(vision_keys, heads, axis=1)) / heads
    likeness = cosines(keys)
    targets_wanted = math.floor(keep * contextual)
    order = descending([float(score) for score in attention_scores])
    rows = {place: features[place] for place in order[: keep - targets_wanted]}
    left = [place for place in range(len(order)) if place not in rows]
    targets = left[:: max(1, len(left) // max(targets_wanted, 1))][:targets_wanted]
    joined: dict[int, list[int]] = {target: [] for target in targets}
    margin = math.inf
    for place in left:
        if targets and place not in joined:
            best = max(targets, key=lambda target: (likeness[place][target], -target))
            lower = [likeness[place][other] for other in targets]
            lower = [value for value in lower if value < likeness[place][best]]
            margin = min(margin, likeness[place][best] - max(lower, default=-math.inf))
            joined[best].append(place)
    for target, others in joined.items():
        rows[target] = features[target].copy()
        for place in others:
            rows[target] += features[place] / len(others)
    return sorted(rows), margin, np.stack([rows[place] for place in sorted(rows)])


def prumerge(
    grid: tuple[int, int],
    keep: int,
    image_features: np.ndarray,
    attention_scores: np.ndarray,
    vision_keys: np.ndarray,
    sampled: float = 0.5,
    neighbours: int = 32,
) -> Merged:
    """Attended and sampled tokens, each with its likest others added, weighted by their attention."""
    features = image_features.astype(np.float64)
    count = grid[0] * grid[1]
    scores = [float(score) for score in attention_scores]
    order = descending(scores)
    spaced = math.floor(keep * sampled)
    kept = set(order[: keep - spaced])
    for run in range(spaced):
        kept.add(math.floor((run + Fraction(1, 2)) * Fraction(count, spaced)))
    for place in order:
        if len(kept) < keep:
            kept.add(place)
    likeness = cosines(vision_keys)
    rows, margin = [], math.inf
    for place in sorted(kept):
        others = [other for other in range(count) if other != place]
        ranked = [others[at] for at in descending([likeness[place][other] for other in others])]
        near, far = ranked[:neighbours], ranked[neighbours:]
        if near and far and likeness[place][near[-1]] > likeness[place][far[0]]:
            margin = min(margin, likeness[place][near[-1]] - likeness[place][far[0]])
        row = features[place].copy()
        for other in near:
            row += scores[other] * features[other]
        rows.append(row)
    return sorted(kept), margin, np.stack(rows)


REFERENCES: dict[str, Callable[..., Merged]] = {"visionzip": visionzip, "prumerge": prumerge}

# Below these margins engines' rounding may decide on arbitrary floats.
MARGINS = dict.fromkeys(REFERENCES, 2e-6)
