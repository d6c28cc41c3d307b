"""A recording played as a camera would give it: each frame when its time has come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_LONG_GAP = 60.0  # seconds between two frames from which on the wait is told


class Pace:
    """Waits until frames are due. `closed` ends every wait.

    clock  seconds, which the waits of `closed` pass as well
    tell   called with a line before a wait of more than a minute between two frames of the source `name`
    """

    def __init__(
        self,
        closed: threading.Event,
        clock: Callable[[], float] = time.monotonic,
        name: str = "",
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._closed, self._clock, self._name, self._tell = closed, clock, name, tell
        self._start: float | None = None
        self._before = 0.0

    def wait(self, seconds: float) -> bool:
        """Wait for the moment `seconds` after the first frame's; returns False once it is closed.

        A frame that is late is not waited for, and the ones after it keep their moments.
        """
        if self._start is None:
            self._start, self._before = self._clock() - seconds, seconds
        self._note_gap(seconds)
        left = self._start + seconds - self._clock()
        return not self._closed.wait(min(max(0.0, left), threading.TIMEOUT_MAX))

    def _note_gap(self, seconds: float) -> None:
        gap, self._before = seconds - self._before, seconds
        if gap > _LONG_GAP:
            self._tell(
                f"the next frame of {self._name} is {gap:g} s after the one before, and is waited for; "
                "--every-frame waits for none"
            )
