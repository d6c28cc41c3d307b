"""Puts a set's questions to bundles, writes every answer down as it comes, and compares with the unpruned."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtp.bench.real import pope
from vtp.bench.real.sets import PublicSet
from vtp.calib import stats
from vtp.calib.data import Sample
from vtp.calib.keep.examiner import Examiner, score
from vtp.calib.keep.journal import Answer, Journal
from vtp.calib.workers.local import Local
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.engine_choice import choose_engines

_BLOCK = 100  # questions between two lines of progress

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One bundle at one keep-count: a score from 0 to 1 for every question, and the median TTFT in ms."""

    method: str
    keep: int
    scores: list[float]
    ttft: float


class Asker:
    """A set's questions, as they are put to one bundle after the other."""

    def __init__(
        self,
        chosen: PublicSet,
        samples: Sequence[Sample],
        journal: Journal,
        *,
        engine: str,
        threads: int | None,
        max_new_tokens: int,
        system: str,
        progress: Progress,
    ) -> None:
        self._set = chosen
        self._samples = samples
        self._journal = journal
        self._engine = engine
        self._threads = threads
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "system": system}
        self._progress = progress
        self._worker = Local()
        self.conditions: dict[str, Any] = {}

    def row(self, bundle: Bundle, method: str, keep: int) -> Row:
        """All questions, answered from the journal where it has them."""
        engine = choose_engines(bundle, self._engine, threads=self._threads).label
        for first in range(0, len(self._samples), _BLOCK):
            some = self._samples[first : first + _BLOCK]
            self._answers(bundle, engine, some, keep)
            self._progress(
                f"{self._set.name}, {method} at {keep}: {first + len(some)} of {len(self._samples)}"
            )
        answers = self._answers(bundle, engine, self._samples, keep)
        scores = score(answers, self._samples, self._set.metric, None)
        times = [one.ttft for one in answers if one.ttft is not None]
        return Row(method, keep, scores, statistics.median(times))

    def close(self) -> None:
        """Close the bundle that is open."""
        self._worker.close()

    def _answers(self, bundle: Bundle, engine: str, samples: Sequence[Sample], keep: int) -> list[Answer]:
        examiner = Examiner(
            bundle, engine, self._threads, samples, self._journal, self._worker, **self._options
        )
        self.conditions = examiner.conditions.to_json()
        return examiner.answers(keep)


def compared(rows: Sequence[Row], chosen: PublicSet, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Each row's figure, and what it is against the first row's (the unpruned): [value, low, high] each.

    From 0 to 1, with 95 % intervals of a bootstrap over the same questions.
    """
    figure, base = chosen.figure(samples), np.asarray(rows[0].scores)
    return [_compared(row, np.asarray(row.scores), base, figure, samples, chosen) for row in rows]


def _compared(
    row: Row,
    scores: np.ndarray,
    base: np.ndarray,
    figure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    samples: Sequence[Sample],
    chosen: PublicSet,
) -> dict[str, Any]:
    count = len(samples)
    one = stats.of(count, lambda draws: figure(scores, draws))
    gap = stats.of(count, lambda draws: figure(scores, draws) - figure(base, draws))
    return {
        "method": row.method,
        "keep": row.keep,
        "score": [one.value, one.low, one.high],
        "difference": [gap.value, gap.low, gap.high],
        "ttft_ms": round(row.ttft, 3),
        "parts": pope.figures(samples, row.scores) if chosen.metric == "pope" else _by_kind(samples, scores),
    }


def _by_kind(samples: Sequence[Sample], scores: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy of each kind of question that the set tells apart."""
    kinds = np.array([sample.kind for sample in samples])
    return {
        kind: {"accuracy": float(scores[kinds == kind].mean()), "questions": int((kinds == kind).sum())}
        for kind in dict.fromkeys(sample.kind for sample in samples)
        if kind
    }
