"""Memory that large pictures leave behind: glibc keeps what was freed, unless it is asked to give it back."""

from __future__ import annotations

import asyncio
import ctypes
import functools
from collections.abc import Callable

__all__ = ["Trimmer", "trim"]

_LARGE = 4_000_000  # pixels of a request: 12 MB in RGB, and several times that on the way
_SECONDS = 1.0  # after a large picture, so that several at once are given back together


class Trimmer:
    """Gives freed memory back to the system a moment after large pictures. For one event loop."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def note(self, pixels: int) -> None:
        """A request whose pictures have this number of pixels is over."""
        if pixels >= _LARGE and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SECONDS, self._go)

    def _go(self) -> None:
        self._timer = None
        asyncio.get_running_loop().run_in_executor(None, trim)


def trim() -> None:
    """Give freed memory back to the system; nothing where the C library is not glibc."""
    if (give_back := _malloc_trim()) is not None:
        give_back(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # no such library, or none with that function
        return None
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    function: Callable[[int], int] = found
    return function
