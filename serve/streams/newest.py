"""One slot between two threads: who reads gets the newest item, and what was replaced unread is counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

from vtp.serve.streams.frames import Frame

T = TypeVar("T")


class Newest(Generic[T]):
    """Holds at most one item. Every method is safe from any thread.

    dropped  how many items were replaced before anyone took them
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._changed = threading.Condition()
        self._items: list[T] = []  # one at most
        self._closed = False

    def put(self, item: T, wait: bool = False) -> bool:
        """Put an item into the slot, in place of one that nobody took; with `wait`, after it was taken.

        Returns whether it is in: not if the slot is closed.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._closed or not self._items)
            if self._closed:
                return False
            self.dropped += len(self._items)
            self._items = [item]
            self._changed.notify_all()
            return True

    def take(self, timeout: float | None = None) -> T | None:
        """Take the item out, waiting for one; None if the slot is closed and empty.

        Raises TimeoutError if none came in `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or bool(self._items), timeout):
                raise TimeoutError
            taken = self._items.pop() if self._items else None
            self._changed.notify_all()
            return taken

    def close(self) -> None:
        """Let nothing more in. An item that lies in the slot may still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Throw away what lies in the slot; it does not count as dropped."""
        with self._changed:
            self._items = []
            self._changed.notify_all()


class PushedFrames:
    """A source whose frames are handed to it, as by a subscription's callback: `put` never waits.

    Its frames must be numbered as they come, so that those dropped here are seen as dropped.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._newest: Newest[Frame] = Newest()

    def put(self, frame: Frame) -> bool:
        """Hand a frame over; returns False after `close`."""
        return self._newest.put(frame)

    def __iter__(self) -> Iterator[Frame]:
        """Wait for frames, the newest each time."""
        while (frame := self._newest.take()) is not None:
            yield frame

    def close(self) -> None:
        """End the iteration."""
        self._newest.close()
