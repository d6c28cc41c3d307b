"""A recording played as a camera would give it: each frame when its time has come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """Waits until frames are due. `closed` ends every wait.

    clock  seconds, which the waits of `closed` pass as well
    """

    def __init__(self, closed: threading.Event, clock: Callable[[], float] = time.monotonic) -> None:
        self._closed, self._clock = closed, clock
        self._start: float | None = None

    def wait(self, seconds: float) -> bool:
        """Wait for the moment `seconds` after the first frame's; returns False once it is closed.

        A frame that is late is not waited for, and the ones after it keep their moments.
        """
        if self._start is None:
            self._start = self._clock() - seconds
        left = self._start + seconds - self._clock()
        return not self._closed.wait(min(max(0.0, left), threading.TIMEOUT_MAX))
