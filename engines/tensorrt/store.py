"""Where a user's TensorRT engines lie, and how this machine knows its own.

An engine file is machine code in a format that its library trusts. So only what was built here is opened: its
stamp carries an HMAC under a key that is made on first use and never leaves the user's cache.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

from vtp.engines.disk.files import open_regular, read_bounded
from vtp.engines.errors import VtpError

KEY = "key"
_KEY_BYTES = 32
_OTHERS = 0o077


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/vtp/engines, or ~/.cache/vtp/engines; it need not be there yet."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        root = base if base.is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise VtpError(
            "no home folder was found for engines; set XDG_CACHE_HOME to a folder of your own"
        ) from error
    return root / "vtp" / "engines"


def make_folder(folder: Path) -> None:
    """Make a folder for engines; those of the cache for this user alone (0700).

    Raises VtpError where it cannot be made, or where one of the cache belongs to or is open to others.
    """
    try:
        if not _is_cached(folder):
            folder.mkdir(parents=True, exist_ok=True)
            return
        cache_folder().parent.parent.mkdir(parents=True, exist_ok=True)
        for one in (cache_folder().parent, cache_folder(), folder):
            one.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise VtpError(f"cannot make {folder} for engines: {error.strerror or error}") from error
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Refuse a folder of the cache that is not this user's alone. What is not there yet is taken."""
    if not _is_cached(folder):
        return
    for one in (cache_folder().parent, cache_folder(), folder):
        with suppress(FileNotFoundError):
            _check_owner(one, one.stat())


def is_private(path: Path) -> bool:
    """Whether a file lies in the cache, where others can neither put nor change one."""
    return _is_cached(path.parent)


def sign(content: bytes) -> str:
    """The HMAC-SHA256 of a stamp's content, in hex; the key is made where there is none yet."""
    path = cache_folder() / KEY
    if not path.exists():
        _make_key(path)
    return hmac.new(_read_key(path), content, hashlib.sha256).hexdigest()


def is_signed(content: bytes, mac: object) -> bool:
    """Whether `mac` is what `sign` gave on this machine. VtpError where the key cannot be trusted."""
    path = cache_folder() / KEY
    if not path.exists() or not isinstance(mac, str):
        return False
    wanted = hmac.new(_read_key(path), content, hashlib.sha256).hexdigest()
    return hmac.compare_digest(wanted.encode(), mac.encode("utf-8", "replace"))


def _is_cached(folder: Path) -> bool:
    return Path(os.path.abspath(folder)).is_relative_to(cache_folder())  # noqa: PTH100 ("..": no links)


def _make_key(path: Path) -> None:
    """Write a new key beside its place and link it there: whole, and never over another's."""
    make_folder(path.parent)
    part = path.with_name(f".{KEY}.{secrets.token_hex(8)}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123
            file.write(secrets.token_bytes(_KEY_BYTES))
        with suppress(FileExistsError):  # another process was first
            os.link(part, path)
    except OSError as error:
        raise VtpError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _read_key(path: Path) -> bytes:
    check_folder(path.parent)
    with open_regular(path) as file:
        _check_owner(path, os.fstat(file.fileno()))
    key = read_bounded(path, _KEY_BYTES)
    if len(key) != _KEY_BYTES:
        raise VtpError(f"{path} is not whole; remove it, and build the engines again")
    return key


def _check_owner(path: Path, found: os.stat_result) -> None:
    if not hasattr(os, "geteuid"):  # Windows, where a user's folders are closed to others by themselves
        return
    if found.st_uid != os.geteuid():
        raise VtpError(f"{path} belongs to another user; set XDG_CACHE_HOME to a folder of your own")
    if found.st_mode & _OTHERS:
        mode = "600" if path.name == KEY else "700"
        raise VtpError(f"{path} is open to other users; remove what is in it, or run: chmod {mode} {path}")
