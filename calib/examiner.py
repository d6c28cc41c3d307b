"""Puts the questions to a bundle at a keep-count, and scores what it answers."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vtp.calib import metrics
from vtp.calib.data import Sample
from vtp.calib.journal import Answer, Journal
from vtp.runtime import Pipeline
from vtp.runtime.bundle import open_bundle

NEW_TOKENS = 32


@dataclass(frozen=True)
class Marks:
    """One keep-count's result: a score from 0 to 1 for every question, and the median TTFT in ms."""

    keep: int
    scores: list[float]
    ttft: float


class Examiner:
    """A bundle under examination on fixed questions. Answers come from the journal where it has them."""

    def __init__(
        self,
        pipe: Pipeline,
        samples: Sequence[Sample],
        journal: Journal,
        *,
        max_new_tokens: int = NEW_TOKENS,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.pipe = pipe
        self.samples = samples
        self.max_new_tokens = max_new_tokens
        self._journal = journal
        self._progress = progress
        self._name = identity(pipe.bundle.folder, max_new_tokens)
        self._warm = False

    def answers(self, keep: int) -> list[Answer]:
        """Greedy answers to every question."""
        known = [self._journal.get(self._name, keep, sample.key) for sample in self.samples]
        missing = known.count(None)
        if missing:
            again = f" ({len(known) - missing} known)" if missing < len(known) else ""
            self._progress(f"{missing} questions at {keep} tokens kept{again}")
        return [
            answer if answer is not None else self._ask(sample, keep)
            for answer, sample in zip(known, self.samples, strict=True)
        ]

    def marks(self, keep: int, metric: str, reference: Sequence[Answer] | None = None) -> Marks:
        """Score the answers at a keep-count; `reference` holds the unpruned ones, for metric "agreement"."""
        answers = self.answers(keep)
        return Marks(keep, score(answers, self.samples, metric, reference), median_ttft(answers))

    def _ask(self, sample: Sample, keep: int) -> Answer:
        if not self._warm:  # the first run pays for set-up, which no figure should hold
            self.pipe.warmup()
            self._warm = True
        result = self.pipe.generate(
            sample.image, sample.prompt, keep_tokens=keep, max_new_tokens=self.max_new_tokens
        )
        answer = Answer(result.text, result.token_ids, round(result.timings.ttft, 3))
        self._journal.add(self._name, keep, sample.key, answer)
        return answer


def score(
    answers: Sequence[Answer], samples: Sequence[Sample], metric: str, reference: Sequence[Answer] | None
) -> list[float]:
    """A score from 0 to 1 for every answer."""
    if metric == "agreement":
        assert reference is not None  # callers that choose this metric have it
        pairs = zip(answers, reference, strict=True)
        return [metrics.agreement(answer.tokens, wanted.tokens) for answer, wanted in pairs]
    judge = {"exact": metrics.exact, "vqa": metrics.vqa}[metric]
    return [judge(answer.text, sample.answers) for answer, sample in zip(answers, samples, strict=True)]


def median_ttft(answers: Sequence[Answer]) -> float:
    """Median milliseconds to the first token."""
    return statistics.median(answer.ttft for answer in answers)


def identity(folder: Path, max_new_tokens: int) -> str:
    """What tells one bundle's answers from another's: a hash over its files' and of the answers' length."""
    files = open_bundle(folder).manifest.files
    text = repr(sorted((name, info.sha256) for name, info in files.items())) + f" {max_new_tokens}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]
