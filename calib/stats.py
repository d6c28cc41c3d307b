"""Intervals by the bootstrap: of a mean, of a difference and of a ratio of means over the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})"


def mean(values: Sequence[float]) -> Estimate:
    """Mean of per-question scores."""
    one = np.asarray(values, float)
    return _estimate(one.mean(), one[_draws(len(one))].mean(axis=1))


def difference(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """Mean difference over the same questions (paired)."""
    return mean(np.asarray(values, float) - np.asarray(base, float))


def ratio(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """Share of the base's score that is kept, over the same questions (paired); 1 where the base scores 0."""
    one, two = np.asarray(values, float), np.asarray(base, float)
    draws = _draws(len(one))
    return _estimate(_share(one.mean(), two.mean()), _share(one[draws].mean(axis=1), two[draws].mean(axis=1)))


def _share(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return np.where(two > 0, one / np.where(two > 0, two, 1), 1.0)


def _draws(count: int) -> np.ndarray:
    """Resampled question numbers [RESAMPLES, count]; the same for the same count."""
    return np.random.default_rng(count).integers(0, count, (RESAMPLES, count))


def _estimate(value: np.ndarray | float, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))
