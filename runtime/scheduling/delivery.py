"""Brings the pieces of an answer from the worker's thread to those who wait, in threads or in asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence


class Delivery:
    """The pieces of one answer so far, and whether it is over. Nobody who reads can hold up who writes."""

    def __init__(self) -> None:
        self.over = False
        self.error: Exception | None = None
        self._pieces: list[str] = []
        self._changed = threading.Condition()
        self._futures: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def put(self, piece: str) -> None:
        """Add a piece."""
        with self._changed:
            self._pieces.append(piece)
            self._wake()

    def end(self, error: Exception | None = None) -> None:
        """No further piece comes; with an error, the answer failed. Only the first call counts."""
        with self._changed:
            if not self.over:
                self.over, self.error = True, error
                self._wake()

    def after(self, seen: int) -> tuple[Sequence[str], bool]:
        """The pieces from number `seen` on, and whether they are the last."""
        with self._changed:
            return self._pieces[seen:], self.over

    def wait(self, seen: int | None = None, timeout: float | None = None) -> bool:
        """Block until there are more than `seen` pieces (None: never) or it is over; False: not in time."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._ready(seen):
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
        return True

    async def changed(self, seen: int | None = None, timeout: float | None = None) -> bool:
        """Wait as `wait` does, in an event loop, and without a task of its own: this is once a token."""
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        while True:
            with self._changed:
                if self._ready(seen):
                    return True
                if end is not None and loop.time() >= end:
                    return False
                future = loop.create_future()
                self._futures.append((loop, future))
            timer = None if end is None else loop.call_at(end, _resolve, future)
            try:
                await future
            finally:
                self._forget(future)
                if timer is not None:
                    timer.cancel()

    def _ready(self, seen: int | None) -> bool:
        return self.over or (seen is not None and len(self._pieces) > seen)

    def _wake(self) -> None:
        """Tell everyone who waits; event loops that were closed meanwhile have nobody left to tell."""
        self._changed.notify_all()
        waiting, self._futures = self._futures, []
        for loop, future in waiting:
            try:
                loop.call_soon_threadsafe(_resolve, future)
            except RuntimeError:
                continue

    def _forget(self, future: asyncio.Future[None]) -> None:
        with self._changed:
            self._futures = [entry for entry in self._futures if entry[1] is not future]


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
