"""Files and folders that appear whole or not at all, whatever ends the process or the machine.

What is written lies beside its target, on the same disk, until it is on the disk to the last byte; then one
step of the kernel puts it in place. A folder is written in `.<name>.partial-*/new`, a file in
`.<name>.*.part`; each is locked by its writer, so that the next writer there removes what belongs to a
process that is gone, and only that. Where the kernel cannot exchange folders in one step, the old one goes to
`.<name>.partial-*/old-<n>` first, and `recover` puts it back if that is where it ended.
"""

from __future__ import annotations

import errno
import functools
import glob
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from vtp.engines.disk.exchange import exchange
from vtp.engines.disk.files import existing
from vtp.engines.disk.locks import claim, is_same, locked_folder, try_lock
from vtp.engines.errors import VtpError

_LOCK, _NEW, _OLD = "lock", "new", "old"
_TRIES = 20
_WRITER_WAITS = 30.0  # seconds for those who are loading what is to be replaced
_READER_WAITS = 5.0  # seconds for a folder that is away between two renames, and for its lock
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS}  # such disks exist

P = ParamSpec("P")
R = TypeVar("R")


# -- folders -------------------------------------------------------------------------------------------------


@contextmanager
def whole_folder(target: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield an empty folder to write to; it becomes `target` at the end, in the place of one that is there.

    `check` raises where `target` must not be written or replaced; it is asked before and after the writing.
    When the body raises, `target` is as it was and nothing else is left. Raises VtpError, in one line, for
    what the system refuses: a full disk, missing rights.
    """
    target = target.resolve()  # a link to a folder stays one: what it points to is replaced
    made = [path for path in target.parents if not path.exists()]
    try:
        with _refusals(f"cannot write to {target.parent}"):
            _remove_leftovers(target)
            check()
            target.parent.mkdir(parents=True, exist_ok=True)
            holder, lock = _make_holder(target)
        try:
            with _refusals(f"writing {target} failed", "; nothing was left behind"):
                (holder / _NEW).mkdir()
                yield holder / _NEW
                sync(holder / _NEW)
                _place(holder, target, check)
                _sync_entry(target.parent)
        finally:
            shutil.rmtree(holder, ignore_errors=True)
            os.close(lock)
            shutil.rmtree(holder, ignore_errors=True)  # on Windows an open file stays
    finally:
        for path in made:  # deepest first, those in which nothing was put
            with suppress(OSError):
                path.rmdir()


def recover(target: Path) -> None:
    """Put a folder back whose writer was ended between two renames; a target that is there is left alone."""
    if os.path.lexists(target):
        return
    for holder in _holders(target):
        with _of_the_dead(holder) as dead:
            if dead:
                _put_back(holder, target)


def undisturbed(read: Callable[Concatenate[Path, P], R]) -> Callable[Concatenate[str | Path, P], R]:
    """Make a function that reads a folder see one folder: the old or the new, while others replace it.

    Its first argument is the folder. It is called again where the folder was replaced all the same, by
    something that knows no locks; what it had opened is closed. Raises VtpError where that does not end.
    """

    @functools.wraps(read)
    def reading(folder: str | Path, *args: P.args, **kwargs: P.kwargs) -> R:
        """`read` of the folder, again while another process replaces it; VtpError after the last try."""
        folder = Path(folder)
        for _ in range(_TRIES):
            _await(folder)
            with locked_folder(folder, shared=True, patience=_READER_WAITS):
                before = _identity(folder)
                try:
                    result = read(folder, *args, **kwargs)
                except Exception:
                    if _identity(folder) == before:
                        raise
                    continue
                if _identity(folder) == before:
                    return result
            getattr(result, "close", lambda: None)()
        raise VtpError(f"{folder} is replaced again and again while it is read; try again later")

    return reading


def _await(folder: Path) -> None:
    """Wait for a folder that is away between a writer's two renames; put it back where that writer died."""
    until = time.monotonic() + _READER_WAITS
    while not os.path.lexists(folder) and time.monotonic() < until:
        away = [old for holder in _holders(folder) for old in holder.glob(f"{_OLD}-*")]
        if not away:
            return
        with suppress(OSError):
            recover(folder)
        time.sleep(0.01)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another at the same path; None: there is none."""
    try:
        found = folder.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _make_holder(target: Path) -> tuple[Path, int]:
    """A folder beside the target that nobody takes for a leftover, and the lock that says so."""
    while True:
        holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        with suppress(FileNotFoundError):  # another took it for a leftover before it was locked
            if (lock := claim(holder / _LOCK)) is not None:
                return holder, lock


def _place(holder: Path, target: Path, check: Callable[[], None]) -> None:
    """Put what was written where it belongs; what was there is in the holder then."""
    for turn in range(_TRIES):
        check()
        try:
            (holder / _NEW).rename(target)  # onto nothing, or an empty folder
            return
        except OSError:
            if not target.is_dir():
                raise
        with locked_folder(target, shared=False, patience=_WRITER_WAITS), suppress(FileNotFoundError):
            if exchange(holder / _NEW, target) or _rename_twice(holder, target, turn):
                return  # else another writer has just moved it away, or replaced it
    raise OSError(errno.EBUSY, "others replace it again and again")


def _rename_twice(holder: Path, target: Path, turn: int) -> bool:
    """The fallback: between its two steps there is no target, and `recover` gives the old one back."""
    old = holder / f"{_OLD}-{turn:03}"
    target.rename(old)
    try:
        (holder / _NEW).rename(target)
    except OSError:
        if target.is_dir():  # another writer was faster: its folder is to be replaced now
            return False
        old.rename(target)
        raise
    return True


def _remove_leftovers(target: Path) -> None:
    recover(target)
    for holder in _holders(target):
        with _of_the_dead(holder) as dead:
            if dead:
                shutil.rmtree(holder, ignore_errors=True)
        if dead:
            shutil.rmtree(holder, ignore_errors=True)  # on Windows the lock file was still open


def _holders(target: Path) -> list[Path]:
    with suppress(OSError, ValueError):  # a name that no system takes has none
        return sorted(target.parent.glob(f".{glob.escape(target.name)}.partial-*"))
    return []


@contextmanager
def _of_the_dead(holder: Path) -> Iterator[bool]:
    """Whether nobody writes in a holder any more; nobody else cleans it up while this lasts."""
    lock = None
    with suppress(OSError):
        lock = claim(holder / _LOCK)
    try:
        yield lock is not None and try_lock(lock) is True  # None: this disk has no locks, so nobody knows
    finally:
        if lock is not None:
            os.close(lock)


def _put_back(holder: Path, target: Path) -> None:
    for old in sorted(holder.glob(f"{_OLD}-*"), reverse=True)[:1]:  # the last that was moved away
        with suppress(OSError):  # somebody has written the target meanwhile
            old.rename(target)


# -- files ---------------------------------------------------------------------------------------------------


@contextmanager
def whole_file(target: Path, beside: Path | None = None) -> Iterator[Path]:
    """Yield the path of an empty file to write to; it becomes `target` at the end.

    beside  the folder in which it lies until then, of the same disk; None: the target's. Its folder stays the
            one that it was when this began, even if another takes that one's place meanwhile.

    When the body raises, `target` is as it was. Raises VtpError, in one line, for what the system refuses.
    """
    beside = beside or target.parent
    with _refusals(f"cannot write {target}"), _opened(target.parent) as folder:
        _remove_parts(beside, target.name)
        part, lock = _make_part(beside, target.name)
        try:
            yield part
            _sync_entry(part)
            if sys.platform == "win32":  # it moves no open file
                os.close(lock)
                lock = -1
            if folder is None:
                part.replace(target)
            else:
                os.replace(part, target.name, dst_dir_fd=folder)
                _sync(folder)
        finally:
            part.unlink(missing_ok=True)
            if lock >= 0:
                os.close(lock)


@contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    """A descriptor of a folder; None on systems that have none."""
    if os.replace not in os.supports_dir_fd and os.rename not in os.supports_dir_fd:
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _make_part(folder: Path, name: str) -> tuple[Path, int]:
    while True:
        part = folder / f".{name}.{secrets.token_hex(4)}.part"
        lock = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if try_lock(lock) is not False and is_same(lock, part):
            return part, lock
        os.close(lock)  # another took it for a leftover before it was locked


def _remove_parts(folder: Path, name: str) -> None:
    """Clean up after writers of a file whose process is gone."""
    for part in folder.glob(f".{glob.escape(name)}.*.part"):
        with suppress(OSError):
            lock = os.open(part, os.O_RDWR)
            try:
                if try_lock(lock) is True and sys.platform != "win32":
                    part.unlink()
            finally:
                os.close(lock)
            if sys.platform == "win32":  # it removes no file that is open anywhere: that is the lock
                part.unlink()


# -- the disk ------------------------------------------------------------------------------------------------


def try_writing(target: Path) -> None:
    """Write a file without a name where `target` will be, and leave nothing; OSError where that is refused.

    So that a disk or folder that is read-only is found before the work, not after it.
    """
    above = existing(target.resolve().parent)
    if not above.is_dir():
        return  # making the folder fails, and says so
    with tempfile.TemporaryFile(dir=above) as file:
        file.write(b"0")


def sync(folder: Path) -> None:
    """Wait until a folder and all that is in it is on the disk, so that a power cut cannot take it."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (path := Path(root, name)).is_symlink():
                _sync_entry(path)
        _sync_entry(Path(root))


def _sync_entry(path: Path) -> None:
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


@contextmanager
def _refusals(what: str, end: str = "") -> Iterator[None]:
    """What the system refuses, as one line; a full disk also where a library tells of it in its own way."""
    try:
        yield
    except OSError as error:
        cure = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise VtpError(f"{what}: {error.strerror or error}{end}{cure}") from error
    except VtpError:
        raise
    except Exception as error:
        full = os.strerror(errno.ENOSPC)
        if full not in str(error):
            raise
        raise VtpError(f"{what}: {full}{end}; free some space") from error
