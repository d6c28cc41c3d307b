"""Standing questions of yes or no: when an alert is raised, and when it is over.

The probability of yes comes from one prefill (`Pipeline.decide`). An alert is raised at its threshold and
ends only below the threshold less the hysteresis, so that a probability that trembles about the threshold
makes one alert and not many; after one that was told, the next is not told before the cool-down is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtp.engines import UsageError
from vtp.engines.errors import quoted_argument
from vtp.runtime.decisions.decision import Decision
from vtp.runtime.generation.arguments import is_number

RAISED, CLEARED = "raised", "cleared"
_LONGEST = 86400.0  # seconds of a cool-down


@dataclass(frozen=True)
class Alert:
    """A question of yes or no about every frame that is asked about.

    threshold   probability of yes from which on it is raised, above 0 and at most 1
    hysteresis  how far below the threshold the probability must fall to end it, from 0 to the threshold
    cooldown    seconds after a raise that was told, in which no other one is told
    """

    question: str
    threshold: float = 0.5
    hysteresis: float = 0.1
    cooldown: float = 10.0

    def __post_init__(self) -> None:
        """Raise UsageError for numbers that are not allowed."""
        _check("threshold", self.threshold, 0.0, 1.0)
        _check("hysteresis", self.hysteresis, 0.0, self.threshold)
        _check("cooldown", self.cooldown, 0.0, _LONGEST)
        if self.threshold == 0:
            raise UsageError("threshold 0 would always be reached; give a probability above 0")


@dataclass(frozen=True)
class AlertReading:
    """What one frame said about one alert.

    probability  of yes, between yes and no
    label_mass   how much of the model's whole probability yes and no have: where it is small, the model
                 wanted to write something else
    on           whether the alert holds now
    event        "raised" or "cleared" if that is to be told; "" otherwise
    decision     the pipeline's whole decision
    """

    question: str
    probability: float
    label_mass: float
    on: bool
    event: str
    decision: Decision

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "question": self.question,
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
        share = decision.probabilities["yes"]
        event = self._moved(share, now)
        return AlertReading(self.alert.question, share, decision.label_mass, self.on, event, decision)

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
