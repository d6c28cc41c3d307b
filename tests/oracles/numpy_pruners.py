"""The pruning methods once more, as plain numpy loops over one picture, written from their description.

Shares no code with vtp.export. Every function returns (kept indices ascending, margin). The margin is the
smallest gap between two numbers whose order decided something and that are not exactly equal. AdaptPrune's
numbers come from float32 products and exponentials, which engines round differently: below about 1e-6 a test
on arbitrary floats must not insist. Inputs on a coarse lattice (all exact in float32) need no margin, and
the other methods compare only what no engine rounds differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

Chosen = tuple[list[int], float]


def descending(values: list[float]) -> list[int]:
    """Positions from the largest value to the smallest; equal values in their own order."""
    return [place for _, place in sorted((-value, place) for place, value in enumerate(values))]


def gap(values: list[float]) -> float:
    """The smallest difference between two unequal values."""
    distinct = sorted(set(values))
    return min((high - low for low, high in pairwise(distinct)), default=math.inf)


def random(grid: tuple[int, int], keep: int, seed: int = 0, **cues: np.ndarray) -> Chosen:
    """The first K of numpy's seeded permutation."""
    order = np.random.default_rng(seed).permutation(grid[0] * grid[1])
    return sorted(int(place) for place in order[:keep]), math.inf


def uniform(grid: tuple[int, int], keep: int, **cues: np.ndarray) -> Chosen:
    """Rows and columns of nearly square cells, in exact fractions."""
    height, width = grid
    # The number of rows nearest to sqrt(K·H/W), half upwards: r is reached once (r - 1/2)² <= K·H/W.
    rows = 0
    while (Fraction(2 * rows + 1, 2)) ** 2 <= Fraction(keep * height, width):
        rows += 1
    rows = min(max(rows, math.ceil(Fraction(keep, width))), height, keep)
    kept, dealt = [], 0
    for row in range(rows):
        count = math.floor(Fraction((row + 1) * keep, rows)) - dealt
        dealt += count
        y = math.floor((row + Fraction(1, 2)) * Fraction(height, rows))
        for column in range(count):
            kept.append(y * width + math.floor((column + Fraction(1, 2)) * Fraction(width, count)))
    return sorted(kept), math.inf


def fastv(grid: tuple[int, int], keep: int, attention_scores: np.ndarray) -> Chosen:
    """The K highest scores."""
    scores = [float(score) for score in attention_scores]
    return sorted(descending(scores)[:keep]), gap(scores)


def vispruner(
    grid: tuple[int, int],
    keep: int,
    image_features: np.ndarray,
    attention_scores: np.ndarray,
    r: float = 0.5,
    published: bool = False,
) -> Chosen:
    """Important tokens, then rounds that thin out the rest.

    `published` keeps to the paper's code, which raises where a round cannot be made as it is written: an odd
    residual, or more to drop than half of it has.
    """
    scores = [float(score) for score in attention_scores]
    order = descending(scores)
    important = int(keep * r)
    kept, residual = order[:important], order[important:]
    wanted = keep - important
    if wanted == 0:
        return sorted(kept), gap(scores)
    likeness, margin = cosines(image_features), gap(scores)
    while len(residual) > wanted:
        drop = min(8, len(residual) - wanted)
        if published and (len(residual) % 2 or drop > len(residual) // 2):
            raise ValueError("the published code stops here")
        drop = min(drop, len(residual) // 2)
        first, second = residual[0::2], residual[1::2]
        best = [max(likeness[a][b] for b in second) for a in first]
        margin = min(margin, gap(best))
        residual = [first[place] for place in descending(best)[drop:]] + second
    return sorted(kept + residual), margin


def cosines(rows: np.ndarray) -> list[list[float]]:
    """Cosine of every pair of rows, to 40 binary places; a zero row is at a right angle to everything."""
    rows = rows.astype(np.float64)
    units = [row / (math.sqrt(float(np.dot(row, row))) or 1.0) for row in rows]
    products = np.array([np.dot(units, unit) for unit in units])
    return np.ldexp(np.rint(np.ldexp(products, 40)), -40).tolist()


def adaptprune(
    grid: tuple[int, int],
    keep: int,
    attention_scores: np.ndarray,
    keys: np.ndarray,
    radius: float = 5.0,
    sigma_space: float = 1.5,
    sigma_feature: float = 0.05,
    **_: Any,
) -> Chosen:
    """Greedy picks, each lowering the scores of near tokens with similar keys.

    Float32 from the scores on, one rounding per operation, as the description asks; the margin is relative
    to the best score of its step.
    """
    height, width = grid
    one = np.float32(1)
    prior = centre_prior(height, width)
    scores = [np.float32(score) * weight for score, weight in zip(attention_scores, prior, strict=True)]
    likeness = cosines(keys)
    left, kept, margin = set(range(height * width)), [], math.inf
    while len(kept) < keep:
        best = max(sorted(left), key=lambda place: scores[place])  # max returns the first of equals
        rest = [scores[place] for place in left if scores[place] != scores[best]]
        if rest and scores[best] > 0:
            margin = min(margin, float(1 - max(rest) / scores[best]))
        kept.append(best)
        left.remove(best)
        for place in left:
            rise, run = place // width - best // width, place % width - best % width
            square = rise * rise + run * run
            if square > radius * radius:
                continue
            near = np.float32(math.exp(-square / (2 * sigma_space**2)))
            apart = one - np.float32(likeness[best][place])
            alike = np.exp(apart * apart * np.float32(-0.5 / sigma_feature**2))
            scores[place] = scores[place] * (one - near * alike)
    return sorted(kept), margin


def centre_prior(height: int, width: int) -> list[np.float32]:
    """The Gaussian around the centre, 1 at its highest, in raster order."""
    sigma = max(height, width) / 2
    values = [
        math.exp(-(axis(y, height) ** 2 + axis(x, width) ** 2) / (2 * sigma**2))
        for y in range(height)
        for x in range(width)
    ]
    return [np.float32(value / max(values)) for value in values]


def axis(step: int, side: int) -> float:
    """Point `step` of `side` points from -(side // 2) to side // 2, mirrored exactly about the centre."""
    if side == 1:
        return 0.0
    return (2 * step - (side - 1)) * (side // 2) / (side - 1)


REFERENCES: dict[str, Callable[..., Chosen]] = {
    "random": random,
    "uniform": uniform,
    "fastv": fastv,
    "vispruner": vispruner,
    "adaptprune": adaptprune,
}
