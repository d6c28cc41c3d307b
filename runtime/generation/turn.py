"""Whose turn it is: a pipeline serves one generation at a time, and others are refused or wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vtp.engines.errors import UsageError, VtpError, quoted_argument
from vtp.runtime.generation.arguments import is_number

__all__ = ["Busy", "Turn", "seconds_to_wait"]

_FOREVER = -1.0  # of `Lock.acquire`


class Busy(VtpError):
    """A pipeline that answers somebody else now; try again, or give `wait=`."""


class Turn:
    """A lock that is held for one generation."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, seconds: float) -> Iterator[None]:
        """Hold the turn; `Busy` if it does not come within `seconds` (0: at once; below 0: without limit)."""
        if not (self._lock.acquire(timeout=seconds) if seconds else self._lock.acquire(blocking=False)):
            raise Busy(
                "this pipeline is busy: it serves one generation at a time; finish or cancel the open "
                "stream, close the scheduler that has it, give wait=SECONDS (but not in the "
                "stream's own thread), or load one Pipeline per thread"
            )
        try:
            yield
        finally:
            self._lock.release()


def seconds_to_wait(wait: bool | float, timeout_ms: float | None) -> float:
    """`wait=` of a caller for `Turn.taken`, within `timeout_ms`; UsageError for anything but a time."""
    if not (isinstance(wait, bool) or (is_number(wait) and 0 <= wait <= threading.TIMEOUT_MAX)):
        raise UsageError(
            f"wait {quoted_argument(wait)} is not a time; give seconds, True (until it is free) or False"
        )
    limit = _FOREVER if timeout_ms is None else min(timeout_ms / 1e3, threading.TIMEOUT_MAX)
    if wait is True:
        return limit
    return float(wait) if limit < 0 else min(float(wait), limit)
