"""A decision: how likely each answer is, read from the logits of the prompt's last place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtp.engines.errors import UsageError, quoted_argument, shown
from vtp.runtime.decisions.question import SCORE, Question
from vtp.runtime.generation.arguments import is_number
from vtp.runtime.generation.logprobs import log_softmax
from vtp.runtime.result import Timings, VisualTokens

_HOTTEST = 100.0
_LITTLE_MASS = 0.01


@dataclass(frozen=True)
class Decision:
    """How likely each answer is.

    kind           the question's: "yes_no", "choice" or "score"
    probabilities  answer -> probability among the answers: they sum to 1. Of a score, the levels' numbers
    answer         the most likely one; of equal ones the first
    score          of a score: the mean level, from 0 to levels - 1; else None
    label_mass     how much of the model's whole probability the answers have: where it is small, the model
                   wanted to write something else, and `probabilities` say little
    visual_tokens, kept, prompt_tokens, timings, tower  as in `Result`
    """

    kind: str
    probabilities: dict[str, float]
    answer: str
    score: float | None
    label_mass: float
    visual_tokens: VisualTokens
    kept: list[Any]
    prompt_tokens: int
    timings: Timings
    tower: dict[str, Any] | None = None

    @property
    def doubt(self) -> str | None:
        """A line that says that the answers mean little, if `label_mass` is below 0.01; else None."""
        if self.label_mass >= _LITTLE_MASS:
            return None
        named = ", ".join(shown(name, 40) for name in self.probabilities)
        return (
            f"the model gives its answers ({named}) together a probability of {self.label_mass:.1g}: it "
            "would write something else, and how it decides among them means little"
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values, as `Result.to_json` gives them."""
        return {
            "kind": self.kind,
            "probabilities": self.probabilities,
            "answer": self.answer,
            "score": self.score,
            "label_mass": self.label_mass,
            "visual_tokens": self.visual_tokens._asdict(),
            "tower": self.tower,
            "kept": self.kept,
            "timings": self.timings.to_dict(),
            "prompt_tokens": self.prompt_tokens,
        }


@dataclass(frozen=True)
class Weighed:
    """The numbers of a decision: see `Decision`."""

    probabilities: dict[str, float]
    label_mass: float

    @property
    def answer(self) -> str:
        """The most likely answer."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    def score(self, kind: str) -> float | None:
        """The mean level of a score."""
        if kind != SCORE:
            return None
        return math.fsum(place * share for place, share in enumerate(self.probabilities.values()))


def weigh(logits: np.ndarray, question: Question, tokens: Sequence[np.ndarray], heat: float) -> Weighed:
    """Probabilities from raw logits [V], at temperature 1 over the whole vocabulary.

    tokens  ids of each answer: its probability is the sum of theirs
    heat    temperature of the answers among each other: p^(1/heat), so that 1 leaves them
    """
    scores = log_softmax(logits)
    each = np.array([np.logaddexp.reduce(scores[ids]) for ids in tokens])
    shares = np.exp((each - each.max()) / heat)
    shares /= shares.sum()
    return Weighed(dict(zip(question.names, shares.tolist(), strict=True)), float(np.exp(each).sum()))


def checked_heat(temperature: object) -> float:
    """A temperature of answers; UsageError unless it is above 0 and at most 100."""
    if not is_number(temperature) or not 0 < temperature <= _HOTTEST:
        raise UsageError(
            f"temperature {quoted_argument(temperature)} is not allowed; choose a number above 0 (1: the "
            f"model's own probabilities) and at most {_HOTTEST:g}"
        )
    return float(temperature)
