"""Standing questions with few answers, one of which raises an alert: when it is raised, and when it is over.

The probability of that answer comes from one prefill (`Pipeline.decide`). An alert is raised at its threshold
and ends only below the threshold less the hysteresis, so that a probability that trembles about the
threshold makes one alert and not many; after one that was told, the next is not told before the cool-down
is over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vtp.engines import UsageError
from vtp.engines.errors import quoted_argument
from vtp.runtime.decisions.decision import Decision
from vtp.runtime.decisions.question import LETTERS, Question
from vtp.runtime.generation.arguments import is_number

RAISED, CLEARED = "raised", "cleared"
_WITH_OPTIONS = re.compile(r"(.*\S)\s*\[([^\[\]]*\|[^\[\]]*)\]")
_LONGEST = 86400.0  # seconds of a cool-down


@dataclass(frozen=True)
class Alert:
    """A question about every frame that is asked about, and the answer that raises the alert.

    options     its answers, as of `Pipeline.decide`; None: yes or no
    answer      which of them raises it
    labels      as of `Pipeline.decide`: "letters", or "texts" for a model that knows the plain question
    threshold   probability of the answer from which on it is raised, above 0 and at most 1
    hysteresis  how far below the threshold the probability must fall to end it, from 0 to below the threshold
    cooldown    seconds after a raise that was told, in which no other one is told
    """

    question: str
    threshold: float = 0.5
    hysteresis: float = 0.1
    cooldown: float = 10.0
    options: tuple[str, ...] | None = None
    answer: str = "yes"
    labels: str = LETTERS

    @classmethod
    def of(cls, text: str, threshold: float, hysteresis: float, cooldown: float, labels: str) -> Alert:
        """From one line: a question of yes or no, or one with its answers behind it, the alarming one first:
        "is the door open ?", "in which state is the door ? [open|closed]".
        """
        if (found := _WITH_OPTIONS.fullmatch(text.strip())) is None:
            return cls(text, threshold, hysteresis, cooldown, labels=labels)
        options = tuple(one.strip() for one in found[2].split("|"))
        return cls(found[1], threshold, hysteresis, cooldown, options, options[0], labels)

    def __post_init__(self) -> None:
        """Raise UsageError for numbers that are not allowed, and for what is not a question."""
        if self.answer not in self.asked.names:
            raise UsageError(
                f"the answer {quoted_argument(self.answer)} is not among {', '.join(self.asked.names)}"
            )
        _check("threshold", self.threshold, 0.0, 1.0)
        if self.threshold == 0:
            raise UsageError("threshold 0 would always be reached; give a probability above 0")
        _check("hysteresis", self.hysteresis, 0.0, self.threshold)
        if self.hysteresis == self.threshold:
            raise UsageError(
                f"hysteresis {self.hysteresis:g} must be below the threshold {self.threshold:g}, or the "
                "alert could never end"
            )
        _check("cooldown", self.cooldown, 0.0, _LONGEST)

    @property
    def asked(self) -> Question:
        """What the model is asked. Raises UsageError."""
        return Question.of(self.question, self.options, labels=self.labels)


@dataclass(frozen=True)
class AlertReading:
    """What one frame said about one alert.

    answer       the one that raises it
    probability  of that answer, among the answers
    label_mass   how much of the model's whole probability the answers have: where it is small, the model
                 wanted to write something else
    on           whether the alert holds now
    event        "raised" or "cleared" if that is to be told; "" otherwise
    decision     the pipeline's whole decision
    """

    question: str
    answer: str
    probability: float
    label_mass: float
    on: bool
    event: str
    decision: Decision

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "question": self.question,
            "answer": self.answer,
            "probability": self.probability,
            "label_mass": self.label_mass,
            "on": self.on,
            "event": self.event,
            "timings": self.decision.timings.to_dict(),
        }


class AlertState:
    """Where one alert stands."""

    def __init__(self, alert: Alert) -> None:
        self.alert = alert
        self.on = False
        self._told = False  # of this raise
        self._last: float | None = None  # when a raise was told

    def read(self, decision: Decision, now: float) -> AlertReading:
        """Take a frame's probability in, at `now` seconds."""
        share = decision.probabilities[self.alert.answer]
        event = self._moved(share, now)
        return AlertReading(
            self.alert.question, self.alert.answer, share, decision.label_mass, self.on, event, decision
        )

    def _moved(self, share: float, now: float) -> str:
        """Change the state; what is to be told about it."""
        alert = self.alert
        if self.on and share < alert.threshold - alert.hysteresis:
            self.on, told, self._told = False, self._told, False
            return CLEARED if told else ""
        if not self.on and share >= alert.threshold:
            self.on = True
        if self.on and not self._told and self._cooled(now):
            self._told, self._last = True, now
            return RAISED
        return ""

    def _cooled(self, now: float) -> bool:
        return self._last is None or now - self._last >= self.alert.cooldown


def _check(name: str, value: object, least: float, most: float) -> None:
    if not is_number(value) or not least <= value <= most:
        raise UsageError(
            f"{name} {quoted_argument(value)} is not allowed; give a number from {least:g} to {most:g}"
        )
