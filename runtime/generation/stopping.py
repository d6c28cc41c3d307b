"""When an answer must end before its text does: it was cancelled, or its time is over.

Whatever works on an answer asks `StopSignal.check` before each piece of work: that raises `Interrupted`,
which the answer's writer catches, so that it never reaches a caller.
"""

from __future__ import annotations

import time

from vtp.engines.errors import UsageError, quoted_argument
from vtp.runtime.generation.arguments import is_number

CANCELLED, TIMEOUT = "cancelled", "timeout"  # finish reasons


class Interrupted(Exception):
    """Raised between two pieces of work; `reason` is the answer's finish_reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Clock:
    """Milliseconds since a call, without the time in which it was `paused`."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._paused: float | None = None

    @property
    def ms(self) -> float:
        """How long it has run."""
        now = time.perf_counter() if self._paused is None else self._paused
        return (now - self._started) * 1e3

    def pause(self) -> None:
        """Stand still until `go_on`."""
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Count again; nothing happens to a clock that does."""
        if self._paused is not None:
            self._started += time.perf_counter() - self._paused
            self._paused = None


class StopSignal:
    """Says whether an answer, or a batch of them, must end now. `cancel` is safe from any thread.

    timeout_ms: milliseconds of `clock` from which on there is no time left; None: no such limit. UsageError
    for anything that is not a number above 0.
    """

    def __init__(self, clock: Clock, timeout_ms: float | None = None) -> None:
        if timeout_ms is not None and not (is_number(timeout_ms) and timeout_ms > 0):
            raise UsageError(
                f"timeout_ms {quoted_argument(timeout_ms)} is not a number of milliseconds above 0; leave "
                "it out to wait for the whole answer"
            )
        self.cancelled = False
        self._clock = clock
        self._timeout_ms = timeout_ms

    def cancel(self) -> None:
        """End the answer before its next piece of work."""
        self.cancelled = True

    @property
    def reason(self) -> str | None:
        """Why it must end; None while it may go on."""
        if self.cancelled:
            return CANCELLED
        late = self._timeout_ms is not None and self._clock.ms >= self._timeout_ms
        return TIMEOUT if late else None

    def check(self) -> None:
        """Raise `Interrupted` if the answer must end."""
        if reason := self.reason:
            raise Interrupted(reason)
