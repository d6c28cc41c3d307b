"""Methods that look at the question, as plain numpy loops over one picture; see numpy_pruners.py.

Margins are relative, of numbers that engines round differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .numpy_pruners import Chosen, cosines, descending, gap
from .numpy_pruners_more import lead


def asked(text_mask: np.ndarray) -> list[int]:
    """Places of the text after the picture; of all text if there is none."""
    after = [place for place, flag in enumerate(text_mask) if flag]
    return after or list(range(len(text_mask)))


def cdpruner(
    grid: tuple[int, int],
    keep: int,
    image_embeds: np.ndarray,
    text_embeds: np.ndarray,
    text_mask: np.ndarray,
    relevance: str = "like",
) -> Chosen:
    """Determinants: after each pick the kernel is what it was, less the part that the pick explains."""
    kernel = np.array(cosines(image_embeds))
    everything = range(len(kernel))
    worth = [value**2 for value in relevances(image_embeds, text_embeds, text_mask, relevance)]
    kept: list[int] = []
    margin = math.inf
    while len(kept) < keep:
        gains = {
            place: float(np.rint(worth[place] * max(kernel[place, place], 2.0**-20) * 2.0**40))
            for place in everything
            if place not in kept
        }
        for place in gains:
            if not image_embeds[place].any() or worth[place] == 0:
                gains[place] = 0.0
        best, by = lead(gains)
        if gains[best] > 0:
            margin = min(margin, by / gains[best])
        kept.append(best)
        if kernel[best, best] > 2.0**-20:  # else it lies in the span of those before
            column = kernel[:, best] / math.sqrt(kernel[best, best])
            for place in everything:
                kernel[place] -= column[place] * column
    return sorted(kept), margin


def relevances(
    image_embeds: np.ndarray, text_embeds: np.ndarray, text_mask: np.ndarray, relevance: str
) -> list[float]:
    """Likeness to the mean of the question, from 0 to 1; in float32 once the cosines are there."""
    rows = image_embeds.astype(np.float64)
    question = np.zeros(rows.shape[1])
    for place in asked(text_mask):
        question += text_embeds[place].astype(np.float64)
    length = math.sqrt(float(question @ question))
    alike = [np.float32(row @ question / (math.sqrt(float(row @ row)) or 1.0)) for row in rows]
    if relevance == "unlike":
        alike = [-value for value in alike]
    span = max(alike) - min(alike)
    if span <= length * 2.0**-20:
        return [1.0 for _ in alike]
    return [float((value - min(alike)) / span) for value in alike]


def pyramiddrop(grid: tuple[int, int], keep: int, next_scores: np.ndarray) -> Chosen:
    """One site: the K highest scores."""
    scores = [float(score) for score in next_scores]
    return sorted(descending(scores)[:keep]), gap(scores)


def sparsevlm(
    grid: tuple[int, int],
    keep: int,
    text_attention: np.ndarray,
    text_gravity: np.ndarray,
    image_embeds: np.ndarray,
    text_embeds: np.ndarray,
    text_mask: np.ndarray,
    heads: int = 0,
) -> Chosen:
    """One site: what the raters look at in the heads that look at the picture most."""
    rating, margin = raters(image_embeds, text_embeds, asked(text_mask))
    looks = []
    for head in text_attention.astype(np.float64):
        look = np.zeros(head.shape[1])
        for text in rating:
            for place, gravity in enumerate(text_gravity[text]):
                look[place] += head[text, place] / (float(gravity) or 1.0)
        looks.append(look)
    wanted = heads or max(1, math.floor(len(looks) * 14 / 32))
    loud = [math.fsum(look) for look in looks]
    chosen = descending(loud)[:wanted]
    margin = min(margin, step([loud[head] for head in descending(loud)], wanted))
    scores = [math.fsum(looks[head][place] for head in chosen) for place in range(text_attention.shape[2])]
    order = descending(scores)
    return sorted(order[:keep]), min(margin, step([scores[place] for place in order], keep))


def step(values: list[float], count: int) -> float:
    """By how much the last of the first `count` is above the next one; infinite if they are equal."""
    if count >= len(values) or values[count - 1] == values[count]:
        return math.inf
    return (values[count - 1] - values[count]) / max(abs(value) for value in values)


def raters(image_embeds: np.ndarray, text_embeds: np.ndarray, texts: list[int]) -> tuple[list[int], float]:
    """The text tokens that draw more than the mean share of the picture, and how clearly."""
    share = dict.fromkeys(texts, 0.0)
    for row in image_embeds.astype(np.float64):
        products = {text: float(row @ text_embeds[text].astype(np.float64)) for text in texts}
        top = max(products.values())
        whole = math.fsum(math.exp(value - top) for value in products.values())
        for text in texts:
            share[text] += math.exp(products[text] - top) / whole * len(texts) / len(image_embeds)
    chosen = [text for text in texts if share[text] > 1 + 2.0**-16]
    margin = min(abs(value - 1 - 2.0**-16) for value in share.values())
    return chosen or texts, margin


REFERENCES: dict[str, Callable[..., Chosen]] = {
    "cdpruner": cdpruner,
    "pyramiddrop": pyramiddrop,
    "sparsevlm": sparsevlm,
}

# Below these margins engines' rounding may decide on arbitrary floats.
MARGINS = {"cdpruner": 1e-5, "sparsevlm": 2e-6}
