"""Files of strangers: opened only if they are regular files, read up to a size, told apart by their bytes."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from vtp.engines.errors import VtpError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def check_regular(path: Path) -> int:
    """Size in bytes of what must be a regular file, a link followed; for files that a library opens by name.

    Raises VtpError for a folder, named pipe, socket or device, and for a file that is not there: opening one
    of them may wait for ever, or do something.
    """
    try:
        return _size(path, path.stat())
    except (OSError, ValueError) as error:
        raise VtpError(f"cannot open {path}: {_reason(error)}") from error


def open_regular(path: Path) -> BinaryIO:
    """A regular file, opened for reading, without ever waiting. Raises VtpError as `check_regular` does."""
    check_regular(path)
    flags = (
        os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    )
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise VtpError(f"cannot open {path}: {_reason(error)}") from error
    try:
        _size(path, os.fstat(descriptor))  # what was looked at may have been replaced since
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file. Raises VtpError as `open_regular` does, and beyond `most` bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise VtpError(f"{path} is larger than {most} bytes, the most that is read of such a file")
    return content


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _size(path: Path, found: os.stat_result) -> int:
    if stat.S_ISREG(found.st_mode):
        return found.st_size
    kind = next((words for test, words in _KINDS if test(found.st_mode)), "something else")
    raise VtpError(f"{path} is {kind}; a regular file is needed there")


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
