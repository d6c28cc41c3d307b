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
    """How many times longer `theirs` take than `ours`: the ratio of their medians and its 95 % interval.

    It is the quotient of the medians that `spread` gives of the same values, so a page that shows all three
    agrees with itself. The i-th of both were measured one after the other, so a slow moment of the machine
    meets both; the interval is of a bootstrap that draws such pairs. Raises ValueError for lists of different
    lengths or none.
    """
    if len(theirs) != len(ours) or not len(ours):
        raise ValueError(f"{len(theirs)} and {len(ours)} measurements make no pairs")
    one, two = np.asarray(theirs, float), np.asarray(ours, float)
    picks = np.random.default_rng(seed).integers(0, len(one), (draws, len(one)))
    drawn = np.median(one[picks], axis=1) / np.median(two[picks], axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"ratio": float(np.median(one) / np.median(two)), "low": float(low), "high": float(high)}


def milliseconds(ms: float) -> str:
    """A time as reports show it, without its unit: "1234", "12.3", "0.12"."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"
