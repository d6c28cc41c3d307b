"""Locks that the kernel lets go when their process ends, however it ends: no process ids, nothing stale."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}
_FAR = 1 << 30  # Windows locks bytes, and refuses to read those: one that no file here has
_POLL = 0.01  # seconds


def try_lock(descriptor: int, shared: bool = False) -> bool | None:
    """Lock an open file or folder, without waiting; True: locked, False: another holds it, None: cannot.

    None is what a disk without locks gives. The lock goes with the descriptor, or with the process.
    """
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _TAKEN else None
    return True


def claim(path: Path) -> int | None:
    """Open a lock file, making it if need be, and lock it; None where another holds or removed it.

    On a disk without locks it is open and not locked. Raises OSError where it cannot be opened.
    """
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a stranger may have laid it there
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)
    if try_lock(descriptor) is not False and is_same(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def is_same(descriptor: int, path: Path) -> bool:
    """Whether a path still names what was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


@contextmanager
def locked_folder(folder: Path, shared: bool, patience: float) -> Iterator[None]:
    """Hold a folder's lock, waiting up to `patience` seconds; without it where that was not enough.

    Loading a bundle shares the lock, and what replaces it wants it alone: so nobody replaces a folder that is
    being loaded. Who goes on without it has to look whether the folder is still the same.
    """
    descriptor, until = _open_folder(folder), time.monotonic() + patience
    try:
        while descriptor is not None:
            if try_lock(descriptor, shared) is not False or time.monotonic() > until:
                break
            time.sleep(_POLL)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open_folder(folder: Path) -> int | None:
    """A descriptor of the folder, which also keeps its number from being given to another; None: cannot."""
    if sys.platform == "win32":  # it opens no folders
        return None
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
