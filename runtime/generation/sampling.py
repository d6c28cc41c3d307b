"""Choosing the next token from a row of logits: greedy, or temperature with top-k and nucleus (top-p).

The tokens that stay eligible are those that transformers' warpers keep, in its order: temperature, top-k,
top-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from vtp.engines.errors import UsageError, VtpError, quoted_argument
from vtp.runtime.generation.arguments import is_number, is_whole

__all__ = ["Sampler", "check_finite"]


class Sampler:
    """Picks tokens; equal seeds and equal logits give equal tokens.

    temperature: 0 (greedy) or more. top_p: above 0, up to 1 (off). top_k: None (off) or 1 and more.
    seed: None (a fresh one each time) or 0 and more. Anything else is a `UsageError`.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> None:
        _check_number(
            "temperature", temperature, is_number(temperature) and temperature >= 0, "0 (greedy) or more"
        )
        _check_number("top_p", top_p, is_number(top_p) and 0 < top_p <= 1, "above 0 and at most 1 (off)")
        _check_number(
            "top_k", top_k, top_k is None or (is_whole(top_k) and top_k >= 1), "a whole number, 1 or more"
        )
        _check_number(
            "seed", seed, seed is None or (is_whole(seed) and seed >= 0), "a whole number, 0 or more"
        )
        self.temperature = float(temperature)
        self.top_p = float(top_p)
        self.top_k = top_k
        self._random = np.random.default_rng(None if seed is None else int(seed))

    def pick(self, logits: np.ndarray, rules: Callable[[np.ndarray], np.ndarray] | None = None) -> int:
        """Return a token id for `logits` [V], float32 or float16; of equal maxima greedy takes the first.

        `rules` changes the logits first (see `LogitsRules`); what it makes -inf is not chosen.

        Raises `VtpError` for logits that are not finite: the model's arithmetic broke, and any token would be
        a lie.
        """
        if logits.ndim != 1 or not logits.size:
            raise VtpError(f"the sampler takes one row of logits, not an array of shape {list(logits.shape)}")
        best = check_finite(logits)
        if rules is not None:
            logits = rules(logits)
            best = int(logits.argmax())
        if self.temperature == 0:
            return best
        kept, probabilities = self.distribution(logits)
        edges = np.cumsum(probabilities)
        place = np.searchsorted(edges, self._random.random() * edges[-1], side="right")
        return int(kept[min(int(place), len(kept) - 1)])

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The eligible token ids, most likely last, and their probabilities (float64, sum 1)."""
        scores = _apply_temperature(logits.astype(np.float32), self.temperature)
        # Of equal scores the lower id counts as likelier, as in greedy; torch leaves that open.
        kept = len(scores) - 1 - np.argsort(scores[::-1], kind="stable")
        kept = kept[int(np.isneginf(logits).sum()) :]  # banned ones come first
        if self.top_k is not None and self.top_k < len(kept):
            kept = kept[scores[kept] >= scores[kept[-self.top_k]]]
        if self.top_p < 1:
            kept = kept[_nucleus_start(scores[kept], self.top_p) :]
        weights = np.exp(scores[kept].astype(np.float64) - float(scores[kept[-1]]))
        return kept, weights / weights.sum()


def check_finite(logits: np.ndarray) -> int:
    """The id of the largest of logits [V], of equal ones the first; VtpError unless all are finite."""
    best = int(logits.argmax())
    # A NaN counts as the largest, so two numbers tell of all: a mask of the vocabulary would cost more.
    if not (math.isfinite(logits[best]) and math.isfinite(logits.min())):
        bad = int((~np.isfinite(logits)).sum())
        raise VtpError(
            f"the model gave {bad} of {logits.size} logits that are NaN or infinite; export it with "
            "--dtype float32, or run it on another engine"
        )
    return best


def _apply_temperature(scores: np.ndarray, temperature: float) -> np.ndarray:
    """scores / temperature in float32; where that overflows, relative to the largest score."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        divided = scores / np.float32(temperature)
        if np.isfinite(divided).all() or np.isfinite(divided[np.isfinite(scores)]).all():
            return divided
        below = scores.astype(np.float64) - float(scores.max())
        return np.maximum(below / temperature, np.finfo(np.float32).min).astype(np.float32)


def _nucleus_start(ascending: np.ndarray, top_p: float) -> int:
    """Where the nucleus begins in scores sorted upwards: what lies before sums to at most 1 - top_p.

    float32 probabilities with a float64 running sum, as torch computes them, so that borders fall alike.
    """
    weights = np.exp(ascending - ascending[-1])
    probabilities = weights / weights.sum()
    running = np.cumsum(probabilities, dtype=np.float64).astype(np.float32)
    outside = int((running <= np.float32(1 - top_p)).sum())
    return min(outside, len(ascending) - 1)


def _check_number(name: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise UsageError(f"{name} {quoted_argument(value)} is not allowed; choose {allowed}")
