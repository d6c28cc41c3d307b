"""Two folders change places in one step of the kernel, where it has such a step."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # renameat2(2), Linux 3.15
_RENAME_SWAP = 2  # renamex_np(2), macOS 10.12
# What kernels, disks and sandboxes say to a call that they do not know.
_UNKNOWN = {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP}


def exchange(one: Path, other: Path) -> bool:
    """Let two existing paths of one disk change places at once; False where this system or disk cannot.

    Raises OSError for what fails for another reason; both are then where they were.
    """
    call = _system_call()
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@functools.cache
def _system_call() -> Callable[[bytes, bytes], int] | None:
    """The C library's function for it; None where it has none."""
    if sys.platform not in ("linux", "darwin"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        swap = getattr(library, "renamex_np", None)
        return None if swap is None else lambda one, other: swap(one, other, ctypes.c_uint(_RENAME_SWAP))
    rename = getattr(library, "renameat2", None)  # glibc 2.28
    if rename is None:
        return None
    return lambda one, other: rename(_AT_FDCWD, one, _AT_FDCWD, other, ctypes.c_uint(_RENAME_EXCHANGE))
