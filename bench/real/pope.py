"""POPE's figures: accuracy, precision, recall, F1 and yes ratio of each way to choose the absent objects.

After evaluate.py of POPE's authors (arXiv 2305.10355); the figure that papers give is the mean F1 of the
three. Where the authors' code divides by zero, the figure is 0 here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vtp.calib.data import Sample

KINDS = ("random", "popular", "adversarial")


def figures(samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, dict[str, float]]:
    """By kind: accuracy, precision, recall, f1, yes_ratio (all from 0 to 1) and the number of questions."""
    found = {}
    for kind in _kinds(samples):
        chosen = [place for place, sample in enumerate(samples) if sample.kind == kind]
        truth, right = _arrays([samples[place] for place in chosen], [scores[place] for place in chosen])
        found[kind] = _figures(truth, right)
    return found


def mean_f1(samples: Sequence[Sample]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The mean over kinds of their F1, as a figure of drawn questions."""
    truth = np.array([sample.answers == ("yes",) for sample in samples])
    kinds = np.array([sample.kind for sample in samples])
    own = [kinds == kind for kind in _kinds(samples)]

    def figure(scores: np.ndarray, draws: np.ndarray) -> np.ndarray:
        right = scores > 0.5
        hits, wrong = truth & right, ~right
        each = [_f1((hits & one)[draws].sum(1), (wrong & one)[draws].sum(1)) for one in own]
        return np.mean(each, axis=0)

    return figure


def _kinds(samples: Sequence[Sample]) -> list[str]:
    return list(dict.fromkeys(sample.kind for sample in samples))


def _arrays(samples: Sequence[Sample], scores: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([one.answers == ("yes",) for one in samples]), np.asarray(scores, float) > 0.5


def _figures(truth: np.ndarray, right: np.ndarray) -> dict[str, float]:
    said = truth == right  # "yes" to what is there, or wrongly to what is not
    hits = int((truth & said).sum())
    return {
        "accuracy": float(right.mean()),
        "precision": _share(hits, int(said.sum())),
        "recall": _share(hits, int(truth.sum())),
        "f1": float(_f1(np.array(hits), np.array((~right).sum()))),
        "yes_ratio": float(said.mean()),
        "questions": len(truth),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _f1(hits: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """2·TP / (2·TP + FP + FN): the harmonic mean of precision and recall."""
    whole = 2 * hits + wrong
    return np.where(whole > 0, 2 * hits / np.where(whole > 0, whole, 1), 0.0)
