"""Wrong numbers and wrong words, counted apart: pruning costs the one more than the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vtp.calib.data import Sample
from vtp.calib.keep.journal import Answer
from vtp.calib.metrics import normalize
from vtp.calib.truth import has_number

_RIGHT = {"agreement": 1.0}  # score from which an answer counts as right; of other metrics: half


@dataclass(frozen=True)
class Share:
    """How many of a kind are wrong."""

    wrong: int
    of: int

    def __str__(self) -> str:
        return f"{self.wrong} of {self.of}"


class Kinds:
    """Which questions are answered by a number, by their true answers; the rest are answered by words."""

    def __init__(self, samples: Sequence[Sample], metric: str, unpruned: Sequence[Answer]) -> None:
        """The truth is what the data (or --truth) says; for "agreement" it is the unpruned answer."""
        pairs = zip(samples, unpruned, strict=True)
        truths = [_truth(one, answer) if metric != "agreement" else answer.text for one, answer in pairs]
        self._numbers = [has_number(truth) for truth in truths]
        self._right = _RIGHT.get(metric, 0.5)

    def numbers(self, scores: Sequence[float]) -> Share:
        """Of the questions that a number answers, those whose answer is wrong."""
        return self._share(scores, True)

    def words(self, scores: Sequence[float]) -> Share:
        """The same of all others."""
        return self._share(scores, False)

    def to_json(self, scores: Sequence[float]) -> dict[str, list[int]]:
        """Wrong and all, of numbers and of words."""
        shares = {"numbers": self.numbers(scores), "words": self.words(scores)}
        return {name: [share.wrong, share.of] for name, share in shares.items()}

    def _share(self, scores: Sequence[float], numbers: bool) -> Share:
        found = [one for one, number in zip(scores, self._numbers, strict=True) if number == numbers]
        return Share(sum(one < self._right for one in found), len(found))


def _truth(sample: Sample, unpruned: Answer) -> str:
    """The answer that most annotators gave, the first of equals."""
    answers = Counter(map(normalize, sample.answers))
    return answers.most_common(1)[0][0] if answers else unpruned.text
