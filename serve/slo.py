"""Tokens before time: under load a request keeps fewer visual tokens, instead of waiting longer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vtp.engines import UsageError
from vtp.runtime.scheduler import Scheduler


@dataclass(frozen=True)
class Chosen:
    """A keep-count, and why it was chosen.

    keep_tokens           the largest that is expected to be in time; else the fastest
    aim_ms, expected_ms   from the request's arrival to its first token
    queue_ms              of `expected_ms`, the time that it is expected to wait
    """

    keep_tokens: int
    aim_ms: float
    expected_ms: float
    queue_ms: float

    @property
    def met(self) -> bool:
        """Whether the first token is expected in time."""
        return self.expected_ms <= self.aim_ms

    def to_json(self) -> dict[str, Any]:
        """What an answer says of it."""
        return {
            "aim_ms": self.aim_ms,
            "expected_ms": round(self.expected_ms, 3),
            "queue_ms": round(self.queue_ms, 3),
            "met": self.met,
        }


@dataclass(frozen=True)
class Slo:
    """An aim for the time to the first token of one model.

    aim_ms  milliseconds, the queue included
    times   keep-count -> milliseconds to the first token without a queue, of those that may be chosen; fewer
            tokens take no longer
    """

    aim_ms: float
    times: Mapping[int, float]

    @classmethod
    def of(cls, scheduler: Scheduler, aim_ms: float, min_keep: int = 1) -> Slo:
        """For a scheduler whose bundle vtp-calib measured here.

        Raises UsageError if it did not, or if `min_keep` leaves nothing to choose.
        """
        measured = scheduler.pipeline.measured_times("--slo-ms")
        held = scheduler.pipeline.manifest.visual.keep
        times = {keep: ms for keep, ms in measured.items() if keep in held and keep >= min_keep}
        if not times:
            known = ", ".join(map(str, sorted(set(measured) & set(held))))
            raise UsageError(f"--min-keep {min_keep} leaves none of the measured keep-counts: {known}")
        return cls(aim_ms, smoothed(times))

    def choose(self, wait_seconds: float) -> Chosen:
        """The keep-count of a request that will wait for some seconds."""
        queue_ms = wait_seconds * 1e3
        within = [keep for keep, ms in self.times.items() if queue_ms + ms <= self.aim_ms]
        fastest = min(self.times.values())
        keep = max(within or [keep for keep, ms in self.times.items() if ms == fastest])
        return Chosen(keep, self.aim_ms, queue_ms + self.times[keep], queue_ms)


def smoothed(measured: Mapping[int, float]) -> dict[int, float]:
    """Times of which none is longer than that of a larger keep-count, as measured ones may be by chance."""
    times: dict[int, float] = {}
    least = float("inf")
    for keep in sorted(measured, reverse=True):
        times[keep] = least = min(least, measured[keep])
    return times
