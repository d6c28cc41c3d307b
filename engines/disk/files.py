"""What tells one file from another, and the one way to open a file that a stranger may have made.

A bundle or a checkpoint folder can hold a pipe, a device or a socket where a file is expected: opening one
waits for ever, or does something. It can hold a link that leads out of the folder, or a file that never ends.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from vtp.engines.errors import VtpError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# Never wait for the other end of a pipe, never take a terminal, never leak into a child; absent on Windows.
_FLAGS = ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")


def open_regular(path: str | Path, within: str | Path | None = None) -> BinaryIO:
    """Open a regular file for reading bytes; nothing else is opened, and the call never waits.

    Links are followed, but with `within` only to files in that folder (for a model of the Hub's cache: the
    model's folder of the cache, whose snapshots are links to its blobs). Raises VtpError, in one line, where
    the file is missing, cannot be read, is not a regular file, or lies elsewhere.
    """
    path = Path(path)
    try:
        if within is not None:
            check_regular(path)
            _check_place(path, Path(within))
        return open_checked(path, partial(_check_kind, path))
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # ValueError: a name with a null; RuntimeError: a loop
        raise VtpError(f"cannot read {path}: {_reason(error)}") from error


def open_checked(path: Path, check: Callable[[int], None]) -> BinaryIO:
    """Open a file for reading bytes without ever waiting; `check` raises for modes that must not be opened.

    It is asked before the file is opened, since opening a device can do something, and once more after it:
    another file may have taken its place. Raises OSError as `os.open`.
    """
    check(path.stat().st_mode)
    flags = os.O_RDONLY
    for flag in _FLAGS:
        flags |= getattr(os, flag, 0)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        check(os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def check_regular(path: str | Path) -> int:
    """Size in bytes of what must be a regular file, a link followed: for files that a library opens by name.

    Raises VtpError as `open_regular`.
    """
    try:
        found = Path(path).stat()
    except (OSError, ValueError, RuntimeError) as error:
        raise VtpError(f"cannot read {path}: {_reason(error)}") from error
    _check_kind(Path(path), found.st_mode)
    return found.st_size


def read_bounded(path: str | Path, limit: int, within: str | Path | None = None) -> bytes:
    """The whole of a regular file of at most `limit` bytes. Raises VtpError as open_regular, or if longer."""
    with open_regular(path, within) as file:
        try:
            size = os.fstat(file.fileno()).st_size  # a buffer of `limit` bytes would be taken at once
            data = file.read(min(limit, size) + 1)
        except OSError as error:
            raise VtpError(f"cannot read {path}: {_reason(error)}") from error
    if len(data) > min(limit, size):  # it may have grown since
        raise VtpError(f"{path} is larger than {limit} bytes, the most that is read of such a file")
    return data


def sha256(path: Path) -> str:
    """Hex sha256 of a regular file, read in pieces."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def existing(path: Path) -> Path:
    """`path` itself, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def free_disk(folder: Path) -> int:
    """Free bytes of the disk that `folder` is or will be on."""
    return shutil.disk_usage(existing(folder)).free


def _check_kind(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for test, name in _KINDS if test(mode)), "not a regular file")
    raise VtpError(f"{path} is {kind} where a regular file is needed; remove it or replace it by the file")


def _check_place(path: Path, folder: Path) -> None:
    if not path.resolve(strict=True).is_relative_to(folder.resolve()):
        raise VtpError(f"{path} is a link that leaves {folder}; put the file itself in its place")


def _reason(error: Exception) -> str:
    if isinstance(error, RuntimeError):  # pathlib's, before Python 3.13, for links that lead to each other
        return os.strerror(errno.ELOOP)
    return str(getattr(error, "strerror", None) or error)


def is_file(path: str | Path) -> bool:
    """Whether a regular file lies there; False as well for names that the system does not take."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False
