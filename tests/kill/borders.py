"""Ends or fails a process at one chosen call into the system: between any two there is a border.

Python tells a profile function of every C function before it is called. Those that reach files are counted,
and at number n the process kills itself as `kill -9` does, or the call fails as it would on a full disk.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

# What reaches the file system, of modules that do: every other C function changes nothing there.
_MODULES = {"posix", "fcntl", "_io"}
# What a full disk refuses; nothing else does.
_TAKES_ROOM = {"open", "write", "mkdir", "link", "symlink", "fsync", "flush", "truncate", "rename", "replace"}
_TAKES_ROOM |= {"sendfile", "copy_file_range", "posix_fallocate"}


def count(work: Callable[[], None], room: bool = False) -> int:
    """Borders of `work`: before every call that reaches files, or (`room`) that takes room there."""
    seen = [0]

    def note(name: str) -> None:
        seen[0] += 1

    _watched(work, note, room)
    return seen[0]


def kill_at(work: Callable[[], None], number: int) -> None:
    """Run `work` and kill this process before its call `number`."""
    _watched(work, _at(number, lambda: os.kill(os.getpid(), signal.SIGKILL)), False)


def fill_at(work: Callable[[], None], number: int) -> None:
    """Run `work`, whose call `number` of those that take room finds no more."""

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _watched(work, _at(number, fail), True)


def _at(number: int, act: Callable[[], None]) -> Callable[[str], None]:
    left = [number]

    def note(name: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            left[0] = sys.maxsize
            act()

    return note


def _watched(work: Callable[[], None], note: Callable[[str], None], room: bool) -> None:
    def look(frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call":
            return
        owner = getattr(called, "__module__", None) or type(getattr(called, "__self__", None)).__module__
        name = getattr(called, "__name__", "")
        if owner in _MODULES and (not room or name in _TAKES_ROOM):
            note(name)

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
