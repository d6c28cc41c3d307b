"""Keeps what Rust's own code prints about a panic from standard error: it is told in one line by us.

A panic of the tokenizers library prints "thread '…' panicked at …" to the process's standard error before it
becomes a Python exception. Nothing in Python can turn that off, so standard error goes into a file while such
code runs, and all of it but those lines comes out afterwards.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_STDERR = 2
_HEAD = rb"\n?thread '[^'\n]*' (?:\(\d+\) )?panicked at [^\n]*:\n"
_TAIL = (
    rb"(?:note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace\n)?"
    rb"(?:stack backtrace:\n(?: +[^\n]*\n)*(?:note: Some details are omitted, [^\n]*\n)?)?"
)


class _Aside:
    """Standard error, put aside while any thread is inside; the last one to leave puts it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = self._file = -1
        self._messages: set[bytes] = set()

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._put_aside()
            self._inside += 1

    def leave(self, message: str | None) -> None:
        with self._lock:
            self._inside -= 1
            if message:
                self._messages.add(message.encode("utf-8", "replace"))
            if not self._inside:
                self._put_back()

    def _put_aside(self) -> None:
        with suppress(OSError):  # closed: there is nothing to keep clean
            saved = os.dup(_STDERR)
            try:
                self._file = _nameless_file()
                os.dup2(self._file, _STDERR, inheritable=True)
            except OSError:
                os.close(saved)
                raise
            self._saved = saved

    def _put_back(self) -> None:
        if self._saved < 0:
            return
        os.dup2(self._saved, _STDERR, inheritable=True)
        with suppress(OSError):
            os.lseek(self._file, 0, os.SEEK_SET)
            text = b"".join(iter(lambda: os.read(self._file, 1 << 16), b""))
            _write(without_panics(text, self._messages))
        os.close(self._file)
        os.close(self._saved)
        self._saved = self._file = -1
        self._messages = set()


_ASIDE = _Aside()


@contextmanager
def without_panic_lines() -> Iterator[None]:
    """While this holds, panics of Rust's code say nothing on standard error; for any number of threads.

    What else is printed there meanwhile, by whatever thread, comes when the last one leaves.
    """
    message: str | None = None
    _ASIDE.enter()
    try:
        yield
    except BaseException as error:
        message = str(error)
        raise
    finally:
        _ASIDE.leave(message)


def without_panics(text: bytes, messages: set[bytes]) -> bytes:
    """The text without the lines about panics with these messages, or with messages of one line."""
    if b"panicked at " not in text:
        return text
    known = b"|".join(re.escape(message) for message in sorted(messages, key=len, reverse=True))
    line = rb"[^\n]*" if not known else known + rb"|[^\n]*"
    return re.sub(_HEAD + rb"(?:" + line + rb")\n" + _TAIL, b"", text)


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("stderr", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write(text: bytes) -> None:
    while text:
        text = text[os.write(_STDERR, text) :]
