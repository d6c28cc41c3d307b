"""Median and spread of repeated measurements, and the 95 % interval of a ratio of paired ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DRAWS = 10_000


def spread(values: Sequence[float]) -> dict[str, Any]:
    """median, low and high (quartiles), runs; of no values, runs 0 alone."""
    if not len(values):
        return {"runs": 0}
    low, median, high = np.quantile(np.asarray(values, float), (0.25, 0.5, 0.75))
    return {"median": float(median), "low": float(low), "high": float(high), "runs": len(values)}


def ratio(
    theirs: Sequence[float], ours: Sequence[float], draws: int = DRAWS, seed: int = 0
) -> dict[str, float]:
    """How many times longer `theirs` take than `ours`, run by run: the median ratio and its 95 % interval.

    The i-th of both were measured one after the other, so a slow moment of the machine meets both. The
    interval is of a bootstrap over those pairs. Raises ValueError for lists of different lengths or none.
    """
    if len(theirs) != len(ours) or not len(ours):
        raise ValueError(f"{len(theirs)} and {len(ours)} measurements make no pairs")
    quotients = np.asarray(theirs, float) / np.asarray(ours, float)
    picks = np.random.default_rng(seed).integers(0, len(quotients), (draws, len(quotients)))
    low, high = np.quantile(np.median(quotients[picks], axis=1), (0.025, 0.975))
    return {"ratio": float(np.median(quotients)), "low": float(low), "high": float(high)}
