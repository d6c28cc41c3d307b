"""Frames that could not be asked about, told in a few lines: a camera may send thousands that fail alike."""

from __future__ import annotations

import time
from collections.abc import Callable

from vtp.engines import VtpError
from vtp.serve.streams.frames import Frame

_QUIET = 10.0  # seconds in which the same reason is not told again


class LeftOut:
    """Tells why frames are left out: a reason at once, and the same one again after ten seconds.

    tell    called with a line
    clock   seconds
    reason  why the last one was left out; "" if none was
    """

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._clock = tell, clock
        self.reason = ""
        self._told_at, self._untold = 0.0, 0

    def add(self, frame: Frame, error: VtpError) -> None:
        """Count one, and tell it unless the same was told a moment ago."""
        self._untold += 1
        why, now = str(error), self._clock()
        if why == self.reason and now - self._told_at < _QUIET:
            return
        more = f" ({self._untold} since the last line)" if self._untold > 1 else ""
        self.reason, self._told_at, self._untold = why, now, 0
        self._tell(f"frame {frame.number} is left out: {why}{more}")

    def end(self) -> None:
        """Tell of those that were not told."""
        if self._untold:
            self._tell(f"{self._untold} more frames were left out")
            self._untold = 0
