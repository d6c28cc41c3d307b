"""Intervals by the bootstrap: of a mean, of a difference and of a ratio of means over the same questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
# Question numbers drawn at a time: 16 MB of them. All draws of VQAv2's 214,354 questions would take 3.4 GB.
_AT_A_TIME = 2_000_000


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
    return _estimate(one.mean(), _resampled(len(one), lambda draws: one[draws].mean(axis=1)))


def of(count: int, figure: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """Any figure of `count` questions: of question numbers [draws, count] it gives one for each draw."""
    return _estimate(figure(np.arange(count)[None])[0], _resampled(count, figure))


def difference(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """Mean difference over the same questions (paired)."""
    return mean(np.asarray(values, float) - np.asarray(base, float))


def ratio(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """Share of the base's score that is kept, over the same questions (paired); 1 where the base scores 0."""
    one, two = np.asarray(values, float), np.asarray(base, float)
    shares = _resampled(len(one), lambda draws: _share(one[draws].mean(axis=1), two[draws].mean(axis=1)))
    return _estimate(_share(one.mean(), two.mean()), shares)


def _share(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return np.where(two > 0, one / np.where(two > 0, two, 1), 1.0)


def _resampled(count: int, figure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`figure` of RESAMPLES draws of `count` questions, [RESAMPLES]; the same draws for the same count.

    `figure` gets question numbers [draws, count], as many draws at a time as a bounded memory holds, and
    gives a number for each draw.
    """
    random, rows = np.random.default_rng(count), max(1, _AT_A_TIME // count)
    return np.concatenate(
        [
            figure(random.integers(0, count, (min(rows, RESAMPLES - done), count)))
            for done in range(0, RESAMPLES, rows)
        ]
    )


def _estimate(value: np.ndarray | float, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))
