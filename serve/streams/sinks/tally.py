"""What a watch comes to: frames seen, asked about and dropped, how old they were, answers a second."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from vtp.runtime.bundle.stream_info import StreamInfo
from vtp.serve.streams.answer import FrameAnswer
from vtp.serve.streams.watcher import Watcher

_KEPT = 10_000  # ages of the last answers; a watch may go on for months


class Tally:
    """Counts answers; the ages are of the last 10,000.

    stream  what the bundle says of its tower, if that reuses pictures
    """

    def __init__(self, watcher: Watcher, stream: StreamInfo | None = None) -> None:
        self._watcher, self._stream = watcher, stream
        self._started = time.monotonic()
        self.dropped = 0
        self.reused: int | None = None  # frames of which the tower recomputed a part; None: it reuses nothing
        self._whole = 0  # frames that it computed whole
        self.asked_ages: deque[float] = deque(maxlen=_KEPT)
        self.ages: deque[float] = deque(maxlen=_KEPT)

    def add(self, answer: FrameAnswer) -> None:
        """Count one."""
        self.dropped += answer.dropped
        if (tower := answer.tower) is not None:
            recomputed = tower["rows"] < tower["of"]
            self.reused = (self.reused or 0) + recomputed
            self._whole += not recomputed and not answer.tower_idle
        self.asked_ages.append(answer.asked_age)
        self.ages.append(answer.age)

    def to_json(self) -> dict[str, Any]:
        """Counts, rates a second, ages in milliseconds."""
        seconds = time.monotonic() - self._started
        seen, asked = self._watcher.seen, self._watcher.asked
        return {
            "seconds": round(seconds, 3),
            "seen": seen,
            "asked": asked,
            "dropped": self.dropped,
            "skipped": self._watcher.skipped,
            **({} if self.reused is None else {"reused": self.reused}),
            "source_fps": round(seen / seconds, 3),
            "fps": round(asked / seconds, 3),
            "asked_age_ms": _ages(self.asked_ages),
            "age_ms": _ages(self.ages),
        }

    def line(self) -> str:
        """The same for people."""
        told = self.to_json()
        age = told["age_ms"]
        ages = f"; age at the answer p50 {age['p50']:.0f} ms, p95 {age['p95']:.0f} ms" if age else ""
        skipped = f", {told['skipped']} skipped (nothing changed)" if told["skipped"] else ""
        skipped += f", {self.reused} recomputed in part{self._why_whole}" if self.reused is not None else ""
        return (
            f"{told['seen']} frames seen, {told['asked']} asked about, {told['dropped']} dropped{skipped} in "
            f"{told['seconds']:.1f} s ({told['fps']:.2f} answers/s){ages}"
        )

    @property
    def _why_whole(self) -> str:
        """Why no frame was recomputed in part, where several were computed."""
        if self.reused or self._whole < 2 or self._stream is None:
            return ""
        if self._stream.pictures == 1:
            return " (the bundle was made with every=1, which computes each whole)"
        least = self._stream.least_cosine
        return f" (each was too unlike the one before: the tower asks for a mean cosine of {least:g})"


def percentile(values: Iterable[float], share: float) -> float:
    """The value that `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _ages(seconds: Iterable[float]) -> dict[str, float]:
    ages = [1e3 * age for age in seconds]
    if not ages:
        return {}
    return {
        "p50": round(percentile(ages, 0.5), 3),
        "p95": round(percentile(ages, 0.95), 3),
        "max": round(max(ages), 3),
    }
