"""More methods as plain numpy loops over one picture; see numpy_pruners.py for what the two numbers mean.

Margins here are of numbers that engines round differently: sums of products in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from . import numpy_pruners
from .numpy_focal import focal
from .numpy_pruners import Chosen, cosines, descending, gap
from .numpy_prunesid import prunesid


def fastervlm(grid: tuple[int, int], keep: int, attention_scores: np.ndarray) -> Chosen:
    """The K highest scores."""
    scores = [float(score) for score in attention_scores]
    return sorted(descending(scores)[:keep]), gap(scores)


def lead(values: dict[int, float]) -> tuple[int, float]:
    """The place of the highest value, the lowest of equals, and by how much it leads the next lower one."""
    best = min(values, key=lambda place: (-values[place], place))
    lower = [value for value in values.values() if value < values[best]]
    return best, values[best] - max(lower) if lower else math.inf


def divprune(grid: tuple[int, int], keep: int, image_embeds: np.ndarray) -> Chosen:
    """Farthest first, by cosine; the first pick is the token that is farthest from its nearest other."""
    likeness = cosines(image_embeds)
    everything = range(len(likeness))
    kept: list[int] = []
    margin = math.inf
    while len(kept) < keep:
        distance = {}
        for place in everything:
            others = [other for other in (kept or everything) if other != place]
            if place not in kept:
                distance[place] = -max((likeness[place][other] for other in others), default=0.0)
        best, by = lead(distance)
        margin = min(margin, by)
        kept.append(best)
    return sorted(kept), margin


def scope(
    grid: tuple[int, int],
    keep: int,
    image_features: np.ndarray,
    attention_scores: np.ndarray,
    alpha: float = 1.0,
) -> Chosen:
    """Attention times the coverage that a token would add; the margin is relative to the best product."""
    likeness = cosines(image_features)
    everything = range(len(likeness))
    covered = [0.0 for _ in everything]
    kept: list[int] = []
    margin = math.inf
    while len(kept) < keep:
        worth = {}
        for place in everything:
            if place not in kept:
                gains = (max(likeness[place][other] - covered[other], 0.0) for other in everything)
                worth[place] = math.fsum(gains) * float(attention_scores[place]) ** alpha
        best, by = lead(worth)
        if worth[best] > 0:
            margin = min(margin, by / worth[best])
        kept.append(best)
        covered = [max(covered[other], likeness[best][other]) for other in everything]
    return sorted(kept), margin


def holov(
    grid: tuple[int, int],
    keep: int,
    image_embeds: np.ndarray,
    attention_scores: np.ndarray,
    crops: int = 0,
    alpha: float = 0.09,
) -> Chosen:
    """Quotas for runs of tokens, then the most attended of each run; float64 until shares are rounded."""
    count = grid[0] * grid[1]
    crops = crops or min(max(1, math.floor(1024 * count / 576 / keep + 1e-9)), count)
    scores = [float(score) for score in attention_scores]
    runs = [list(run) for run in np.array_split(np.arange(count), crops)]
    worth = [crop_score(image_embeds[run], [scores[place] for place in run], alpha) for run in runs]
    grain = 2.0 ** (math.floor(math.log2(keep / crops)) - 17)
    shares = [round(value / (sum(worth) + 1e-6) * keep / grain) * grain for value in worth]
    quota = [math.floor(share) for share in shares]
    for crop in descending(shares)[: keep - sum(quota)]:
        quota[crop] += 1
    kept: list[int] = []
    for run, allowed in zip(runs, quota, strict=True):
        kept += [int(run[place]) for place in descending([scores[place] for place in run])[:allowed]]
    kept += [place for place in descending(scores) if place not in kept][: keep - len(kept)]
    return sorted(kept), math.inf


def crop_score(rows: np.ndarray, scores: list[float], alpha: float) -> float:
    """Mean of attention and of the variance of cosines, the latter scaled to the former."""
    rows = rows.astype(np.float64)
    units = [row / (math.sqrt(float(np.dot(row, row))) + 1e-6) for row in rows]
    size = len(units)
    variances = []
    for one in range(size):
        line = [float(np.dot(units[one], units[two])) if one != two else 0.0 for two in range(size)]
        mean = sum(line) / max(size - 1, 1)
        variances.append(sum((value - mean) ** 2 for value in line) / max(size - 1, 1))
    attended, spread = 1000 * sum(scores) / size, sum(variances) / size
    return sum(1000 * score for score in scores) / size + alpha * spread * attended / (spread + 1e-6)


def dart(
    grid: tuple[int, int],
    keep: int,
    keys: np.ndarray,
    hidden_states: np.ndarray,
    pivots: int = 8,
    **_: str,
) -> Chosen:
    """Pivots of the largest L1 norm; each in turn keeps the free tokens least like it."""
    sizes = [math.fsum(abs(float(value)) for value in row) for row in keys]
    order = descending(sizes)
    kept = order[: min(pivots, keep)]
    margin = gap([sizes[place] for place in order[: len(kept) + 1]]) / max(max(sizes), 1e-30)
    likeness = cosines(hidden_states)
    chosen = list(kept)
    for turn, pivot in enumerate(kept):
        free = [place for place in range(len(sizes)) if place not in chosen]
        wanted = len(range(turn, keep - len(kept), len(kept)))
        far = [-likeness[pivot][place] for place in free]
        ranked = descending(far)
        if 0 < wanted < len(free):
            ahead, behind = far[ranked[wanted - 1]], far[ranked[wanted]]
            margin = min(margin, ahead - behind if ahead > behind else math.inf)
        chosen += [free[place] for place in ranked[:wanted]]
    return sorted(chosen), margin


def hiprune(
    grid: tuple[int, int],
    keep: int,
    middle_received: np.ndarray,
    received_scores: np.ndarray,
    alpha: float = 0.1,
) -> Chosen:
    """Anchors of the middle block, the tokens one step from them, and the most attended of the rest."""
    height, width = grid
    middle, last = [[float(score) for score in scores] for scores in (middle_received, received_scores)]
    anchors = descending(middle)[: round(keep * alpha / 5)]
    buffers = []
    for place in range(height * width):
        y, x = divmod(place, width)
        steps = [abs(y - anchor // width) + abs(x - anchor % width) for anchor in anchors]
        if 1 in steps and place not in anchors:
            buffers.append(place)
    order = [*anchors, *buffers]
    order += [place for place in descending(last) if place not in order]
    return sorted(order[:keep]), min(gap(middle), gap(last))


def otprune(grid: tuple[int, int], keep: int, image_embeds: np.ndarray, gamma: float = 0.0) -> Chosen:
    """Determinants: after each pick the kernel is what it was, less the part that the pick explains.

    gamma is 0.01 for embeddings 4,096 wide, unless it is told.
    """
    if gamma == 0.0:
        gamma = 0.01 * (4096 / image_embeds.shape[1]) ** 2
    rows = image_embeds.astype(np.float64)
    lengths = [math.sqrt(float(column @ column)) or 1.0 for column in rows.T]
    rows = rows / np.array(lengths)
    gram = np.array([[float(one @ two) for two in rows] for one in rows])
    added = gamma * np.array([[float(one @ two) for two in gram] for one in gram])
    diagonal = added.diagonal() + 1
    kernel = np.rint(added / np.sqrt(np.outer(diagonal, diagonal)) * 2.0**40) / 2.0**40
    np.fill_diagonal(kernel, 1.0)
    worth, kept, margin = diagonal / diagonal.max(), list[int](), math.inf
    while len(kept) < keep:
        gains = {
            place: float(np.rint(worth[place] * max(kernel[place, place], 2.0**-20) * 2.0**40))
            for place in range(len(rows))
            if place not in kept
        }
        best, by = lead(gains)
        margin = min(margin, by / gains[best])
        kept.append(best)
        column = kernel[:, best] / math.sqrt(kernel[best, best])
        kernel = kernel - np.outer(column, column)
    return sorted(kept), margin


def change(grid: tuple[int, int], keep: int, picture: np.ndarray, reference_picture: np.ndarray) -> Chosen:
    """The cells whose pixels differ most, on the mean, from the reference's."""
    rows, columns = grid
    height, width = picture.shape[1] // rows, picture.shape[2] // columns
    means = []
    for y in range(rows):
        for x in range(columns):
            apart = [
                abs(float(picture[place]) - float(reference_picture[place]))
                for place in np.ndindex(picture.shape)
                if place[1] // height == y and place[2] // width == x
            ]
            means.append(math.fsum(apart) / len(apart))
    return sorted(descending(means)[:keep]), gap(means)


def evs(grid: tuple[int, int], keep: int, image_embeds: np.ndarray) -> Chosen:
    """The first frame; then the cells least like the same cell one frame before, wherever in the clip."""
    frames, cells = grid
    rows = [[float(number) for number in row] for row in image_embeds]
    unlike = []
    for place in range(cells, frames * cells):
        one, other = rows[place], rows[place - cells]
        lengths = math.hypot(*one) * math.hypot(*other)
        product = math.fsum(a * b for a, b in zip(one, other, strict=True))
        unlike.append(1 - product / lengths if lengths else 1.0)
    order = descending(unlike)[: keep - cells]
    return sorted([*range(cells), *(cells + place for place in order)]), gap(unlike)


REFERENCES: dict[str, Callable[..., Chosen]] = {
    **numpy_pruners.REFERENCES,
    "fastervlm": fastervlm,
    "focal": focal,
    "divprune": divprune,
    "scope": scope,
    "holov": holov,
    "change": change,
    "dart": dart,
    "evs": evs,
    "hiprune": hiprune,
    "otprune": otprune,
    "prunesid": prunesid,
}

# Below these margins engines' rounding may decide on arbitrary floats.
MARGINS = {"otprune": 1e-9, "prunesid": 2e-6, "divprune": 2e-6, "scope": 4e-6, "dart": 1e-6, "focal": 2e-6}
MARGINS |= {"evs": 1e-6, "change": 2e-6}
