"""What a node says about one frame, and the JSON of `~/answer_json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vtp.runtime.decisions.decision import Decision
from vtp.runtime.result import Result, Timings, VisualTokens

__all__ = ["Alarm", "Answer", "Received"]

_SECOND = 10**9  # nanoseconds


@dataclass(frozen=True)
class Received:
    """A message as it came from a topic; its picture is decoded only if it is asked about.

    message   what the middleware gave
    number    counts the messages of this subscription, from 0
    stamp_ns  its header's stamp, in nanoseconds; 0: the publisher gave none
    frame_id  its header's frame
    came_ns   when it came, by the node's clock
    """

    message: Any
    number: int
    stamp_ns: int
    frame_id: str
    came_ns: int

    @property
    def taken_ns(self) -> int:
        """When the picture was taken, as far as is known."""
        return self.stamp_ns or self.came_ns


@dataclass(frozen=True)
class Answer:
    """One answer about one frame; of a node that has only an alert, `result` is None.

    frame     what was asked about
    prompt    the question
    result    the pipeline's whole result
    asked_ns  when the model took the frame, and
    said_ns   when it had answered: both by the node's clock
    dropped   frames that came after the one of the answer before, and were never asked about
    alert     the alert's question, its decision, and whether it is raised; None without an alert
    """

    frame: Received
    prompt: str
    result: Result | None
    asked_ns: int
    said_ns: int
    dropped: int
    alert: tuple[str, Decision, bool] | None = None

    @property
    def text(self) -> str:
        """The answer, or the alert's own."""
        if self.result is not None:
            return self.result.text
        return self.alert[1].answer if self.alert else ""

    @property
    def timings(self) -> Timings:
        """Where the time went; of an alert beside a question, the question's."""
        return self._source.timings

    @property
    def visual_tokens(self) -> VisualTokens:
        """Before and after pruning."""
        return self._source.visual_tokens

    @property
    def tower(self) -> dict[str, float] | None:
        """With `stream_reuse`: rows of the tower that were recomputed, of how many, and their cosine to the
        reference's unless it was computed whole; else None."""
        return self.timings.tower

    @property
    def _source(self) -> Result | Decision:
        if self.result is not None:
            return self.result
        assert self.alert is not None  # there is a question, or an alert
        return self.alert[1]

    def to_json(self) -> str:
        """One line of JSON."""
        frame = self.frame
        seconds, rest = divmod(frame.stamp_ns, _SECOND)
        answer = {
            "stamp": {"sec": seconds, "nanosec": rest},
            "frame_id": frame.frame_id,
            "number": frame.number,
            "asked_age_ms": _milliseconds(self.asked_ns - frame.taken_ns),
            "age_ms": _milliseconds(self.said_ns - frame.taken_ns),
            "dropped": self.dropped,
            "prompt": self.prompt,
            "text": self.text,
            "finish_reason": self.result.finish_reason if self.result else "decided",
            "visual_tokens": self.visual_tokens._asdict(),
            **({} if self.tower is None else {"tower": self.tower}),
            "timings": self.timings.to_dict(),
        }
        if self.alert is not None:
            answer["alert"] = _alert_json(*self.alert)
        return json.dumps(answer, ensure_ascii=False)


class Alarm:
    """Whether an alert is raised: from `threshold` on, until it falls below it by more than `hysteresis`."""

    def __init__(self) -> None:
        self.raised = False

    def decide(self, probability: float, threshold: float, hysteresis: float) -> bool:
        """Take the probability of one frame."""
        self.raised = probability >= (threshold - hysteresis if self.raised else threshold)
        return self.raised


def _alert_json(question: str, decision: Decision, raised: bool) -> dict[str, Any]:
    return {
        "question": question,
        "raised": raised,
        "probability": decision.probabilities["yes"],
        "label_mass": decision.label_mass,
        "timings": decision.timings.to_dict(),
    }


def _milliseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)
