"""Methods that merge, as plain numpy loops over one picture; see numpy_pruners.py for indices and margin.

Every function returns (kept indices ascending, margin, rows [K,C] float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from .numpy_pruners import cosines, descending, gap
from .numpy_pruners_more import lead

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


def apet(grid: tuple[int, int], keep: int, image_features: np.ndarray, basis: int = 10) -> Merged:
    """The basis, the tokens farthest from what it makes of them, and the rest averaged into these."""
    features = image_features.astype(np.float64)
    count, picks, margin = len(features), [0], math.inf
    near = dict.fromkeys(range(1, count), math.inf)  # of the free places, the distance to the nearest pick
    while len(picks) < min(basis, keep):
        for place, before in near.items():
            away = features[place] - features[picks[-1]]
            near[place] = min(before, float(away @ away))
        best, by = lead(near)
        margin = min(margin, by / max(near.pop(best), 1e-30))
        picks.append(best)
    seeds = features[picks]
    shares = np.linalg.solve(seeds @ seeds.T + 1e-5 * np.eye(len(picks)), seeds @ features.T)
    longest = max(math.sqrt(float(row @ row)) for row in features) or 1e-30
    away = [math.sqrt(float(row @ row)) / longest for row in features - shares.T @ seeds]
    errors = [-1.0 if place in picks else float(np.rint(away[place] * 2.0**26)) for place in range(count)]
    order = descending(errors)
    hard, rest = order[: keep - len(picks)], order[keep:]
    margin = min(margin, gap(errors) / 2.0**26)
    rows, closest = averaged(features, hard, rest)
    rows |= {pick: features[pick] for pick in picks}
    return sorted(rows), min(margin, closest), np.stack([rows[place] for place in sorted(rows)])


def averaged(features: np.ndarray, kept: list[int], rest: list[int]) -> tuple[dict[int, np.ndarray], float]:
    """Rows of the kept places, each with those of the rest that are most like it, and how clear that was."""
    likeness, margin = cosines(features), math.inf
    joined: dict[int, list[int]] = {place: [place] for place in kept}
    for place in rest if kept else []:
        best = max(kept, key=lambda target: (likeness[place][target], -kept.index(target)))
        lower = [likeness[place][other] for other in kept if likeness[place][other] < likeness[place][best]]
        margin = min(margin, likeness[place][best] - max(lower, default=-math.inf))
        joined[best].append(place)
    return {place: features[own].mean(axis=0) for place, own in joined.items()}, margin


def vscan(
    grid: tuple[int, int],
    keep: int,
    image_embeds: np.ndarray,
    early_scores: np.ndarray,
    attention_scores: np.ndarray,
    window: int = 6,
    local: float = 0.5,
) -> Merged:
    """The best of each window by the early scores, then the best of all by the last ones."""
    height, width = grid
    early, last = [[float(score) for score in scores] for scores in (early_scores, attention_scores)]
    cut: dict[tuple[int, int], list[int]] = {}
    for place in range(height * width):
        cut.setdefault((place // width // window, place % width // window), []).append(place)
    kept: list[int] = []
    for places in cut.values():
        ranked = descending([early[place] for place in places])
        kept += [places[at] for at in ranked[: math.floor(keep * local) // len(cut)]]
    kept += [place for place in descending(last) if place not in kept][: keep - len(kept)]
    features, kept = image_embeds.astype(np.float64), sorted(kept)
    rows, margin = averaged(features, kept, [place for place in range(height * width) if place not in kept])
    return kept, margin, np.stack([rows[place] for place in kept])


REFERENCES: dict[str, Callable[..., Merged]] = {
    "visionzip": visionzip,
    "prumerge": prumerge,
    "apet": apet,
    "vscan": vscan,
}

# Below these margins engines' rounding may decide on arbitrary floats.
MARGINS = dict.fromkeys(REFERENCES, 2e-6)
