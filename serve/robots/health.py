"""How a node does: what `/diagnostics` says of it, by frame age, drops, latency and failures."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import IntEnum

from vtp.serve.robots.answers import Answer, Received
from vtp.serve.robots.settings import Phase

__all__ = ["Health", "Level", "Report"]

_SECOND = 10**9  # nanoseconds
_LOST = 5  # times `stale_after`: the camera is gone


class Level(IntEnum):
    """DiagnosticStatus' levels."""

    OK = 0
    WARN = 1
    ERROR = 2


@dataclass(frozen=True)
class Report:
    """What is said at one moment: the level, one line, and figures as text."""

    level: Level
    message: str
    values: dict[str, str] = field(default_factory=dict)


class Health:
    """Counts and the last of everything, written by the node's threads and read by its diagnostics."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: Received | None = None
        self._answer: Answer | None = None
        self._problem = ""
        self._clear()

    def activated(self, now_ns: int, topic: str) -> None:
        """A new subscription begins."""
        with self._lock:
            self._clear()
            self._since_ns, self._topic, self._problem = now_ns, topic, ""

    def received(self, frame: Received) -> None:
        """A frame came."""
        with self._lock:
            self._frames += 1
            self._newest = frame

    def said(self, answer: Answer) -> None:
        """A frame was answered."""
        with self._lock:
            self._answers += 1
            self._dropped += answer.dropped
            self._answer, self._problem = answer, ""

    def failed(self, line: str) -> None:
        """A frame could not be answered, or a transition failed."""
        with self._lock:
            self._failures += 1
            self._problem = line

    def cleared(self) -> None:
        """What failed is over: a transition succeeded."""
        with self._lock:
            self._problem = ""

    def report(self, phase: Phase, now_ns: int, stale_after: float) -> Report:
        """The level, its reason and the figures, by the node's clock."""
        with self._lock:
            level, message = self._state(phase, now_ns, stale_after)
            return Report(level, message, self._figures(phase, now_ns))

    def _clear(self) -> None:
        self._frames = self._answers = self._dropped = self._failures = 0
        self._newest, self._answer = None, None
        self._since_ns, self._topic = 0, ""

    def _state(self, phase: Phase, now_ns: int, stale_after: float) -> tuple[Level, str]:
        if self._problem:
            return Level.ERROR, self._problem
        if phase is not Phase.ACTIVE:
            return Level.OK, phase.name.lower()
        if self._newest is None:
            waited = (now_ns - self._since_ns) / _SECOND
            level = Level.ERROR if waited > stale_after else Level.OK
            return level, f"no frame has come on {self._topic} for {waited:.1f} s, since activation"
        return self._freshness((now_ns - self._newest.taken_ns) / _SECOND, stale_after)

    def _freshness(self, age: float, stale_after: float) -> tuple[Level, str]:
        if age > _LOST * stale_after:
            return Level.ERROR, f"no frame comes on {self._topic}: the newest is {age:.1f} s old"
        if age > stale_after:
            return Level.WARN, f"the newest frame is {age:.1f} s old"
        if age < -stale_after:
            return Level.WARN, f"the newest frame's stamp is {-age:.1f} s ahead of this node's clock"
        return Level.OK, "answering" if self._answers else "waiting for the first answer"

    def _figures(self, phase: Phase, now_ns: int) -> dict[str, str]:
        figures = {
            "state": phase.name.lower(),
            "frames": str(self._frames),
            "answers": str(self._answers),
            "dropped": str(self._dropped),
            "failures": str(self._failures),
        }
        if self._newest is not None:
            figures["frame_age_ms"] = _milliseconds(now_ns - self._newest.taken_ns)
        if (answer := self._answer) is not None:
            figures["latency_ms"] = _milliseconds(answer.said_ns - answer.frame.taken_ns)
            figures["inference_ms"] = f"{answer.timings.total:.1f}"
            figures["visual_tokens"] = f"{answer.visual_tokens.after} of {answer.visual_tokens.before}"
        return figures


def _milliseconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.1f}"
