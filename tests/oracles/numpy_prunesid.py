"""PruneSID as plain numpy loops over one picture; see numpy_pruners.py for indices and margin."""

from __future__ import annotations

import math

import numpy as np

from .numpy_pruners import Chosen, descending


def prunesid(
    grid: tuple[int, int], keep: int, image_features: np.ndarray, attention_scores: np.ndarray, group: int = 4
) -> Chosen:
    """Groups, those standing in each, quotas, and the first of each group."""
    features = image_features.astype(np.float64)
    scores = [float(score) for score in attention_scores]
    belongs, sure = groups(features, max(1, keep // group))
    members: list[list[int]] = [[] for _ in range(max(1, keep // group))]
    for place in descending(scores):
        members[belongs[place]].append(place)
    standing, margin = survivors(members, features, keep / 32)
    numbers = quotas([len(one) for one in members], [len(one) for one in standing], keep)
    kept: list[int] = []
    for all_of, first, number in zip(members, standing, numbers, strict=True):
        ranked = [*first, *(place for place in all_of if place not in first)]
        kept += ranked[:number]
    return sorted(kept), min(sure, margin)


def groups(features: np.ndarray, count: int) -> tuple[list[int], float]:
    """The direction in which every token weighs most, and by how much it leads at least."""
    weights = 1 / (1 + np.exp(-features))
    weights -= weights.mean(axis=1, keepdims=True)
    lines = np.random.default_rng(0).standard_normal((count, len(features))).astype(np.float32)
    current = [line.astype(np.float64) for line in lines]
    for _ in range(6):
        made: list[np.ndarray] = []
        for line in current:
            line = weights @ (weights.T @ line)
            rest = line.copy()
            for other in made:
                rest -= (other @ rest) * other
            small = rest @ rest <= 1e-20 * (line @ line)
            made.append(np.zeros_like(rest) if small else rest / math.sqrt(rest @ rest))
        current = made
    belongs, margin = [], math.inf
    for place in range(len(features)):
        sizes = [float(np.rint(abs(line[place]) * 2.0**20)) for line in current]
        best = descending(sizes)[0]
        margin = min(
            [margin, *(abs(sizes[best] - other) / 2.0**20 for other in sizes if other != sizes[best])]
        )
        belongs.append(best)
    return belongs, margin


def survivors(members: list[list[int]], features: np.ndarray, ratio: float) -> tuple[list[list[int]], float]:
    """Of each group, in order of attention, those unlike all that stand already."""
    units = [row / (math.sqrt(float(row @ row)) or 1.0) for row in features]
    pairs = [float(units[a] @ units[b]) for a in range(len(units)) for b in range(a)]
    threshold = ratio * (math.fsum(pairs) / max(1, len(pairs)))
    standing, margin = [], math.inf
    for group in members:
        stands: list[int] = []
        for place in group:
            likes = [float(units[place] @ units[other]) for other in stands]
            margin = min([margin, *(abs(like - threshold) for like in likes)])
            if not any(like > threshold + 2.0**-30 for like in likes):
                stands.append(place)
        standing.append(stands)
    return standing, margin


def quotas(sizes: list[int], standing: list[int], keep: int) -> list[int]:
    """How many tokens each group gives."""
    least = [min(1, size) for size in sizes]
    most = [min(5 * -(-keep // 64), number) for number in standing]
    while sum(most) < keep:
        most = [min(bound + 1, size) for bound, size in zip(most, sizes, strict=True)]
    others, whole, dealt, so_far = keep - sum(least), sum(standing), 0, 0
    numbers = []
    for group, number in enumerate(standing):
        so_far += number
        upto = (2 * so_far * others + whole) // (2 * whole)
        numbers.append(min(least[group] + upto - dealt, most[group]))
        dealt = upto
    for group in descending([float(number) for number in standing]):
        numbers[group] += min(most[group] - numbers[group], keep - sum(numbers))
    return numbers
