"""Answers as an MCAP recording, which lies beside that of the pictures in Foxglove and rosbag2."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import shown
from vtp.runtime.bundle.folder import check_outside
from vtp.runtime.media.images import reason
from vtp.serve.robots.cdr import STRING, string_message
from vtp.serve.streams.answer import FrameAnswer

__all__ = ["McapAnswers", "check_recording"]

_DEFINITION = b"string data\n"
ANSWER, ANSWER_JSON = "/vtp/answer", "/vtp/answer_json"
_LATEST = 2**64 - 1  # nanoseconds that a recording can tell
_IN_MEMORY = 2**16  # bytes of answers that are not in the file yet: what is lost if the process is killed


def check_recording(path: Path) -> None:
    """Refuse what can be refused before a model is loaded: UsageError for a file that is there already or
    cannot be made, VtpError without the library."""
    _load_writer()
    check_outside(path)
    if path.exists() or path.is_symlink():
        raise UsageError(f"'{shown(path)}' is there already; give another file")
    if not path.parent.is_dir():
        raise UsageError(f"the folder '{shown(path.parent)}' does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"'{shown(path)}' cannot be written; choose a path that you can write to")


class McapAnswers:
    """A sink that writes each answer as two std_msgs/String: its text, and its JSON.

    The file begins with the first answer.

    Both are logged at the time of the answer's frame, so that they lie beside it. A context manager; a
    recording that did not end well (the process was killed) lacks its index, and `mcap recover` makes it.
    """

    def __init__(self, path: Path) -> None:
        """Raise what `check_recording` does; nothing is written yet."""
        check_recording(path)
        self._path = path
        self._out: _Recording | None = None

    def __call__(self, answer: FrameAnswer) -> None:
        """Write one. Raises UsageError if the file has come meanwhile, VtpError if it cannot be written."""
        told = json.dumps(answer.to_json(), ensure_ascii=False)
        stamp = min(max(0, answer.frame.stamp_ns), _LATEST)
        with self._errors():
            self._out = self._out or _Recording(self._path)
            self._out.write(stamp, answer.frame.number % 2**32, (answer.text, told))

    def close(self) -> None:
        """Write the index and end the file; without an answer there is none. Raises VtpError."""
        if self._out is not None:
            with self._errors():
                self._out.end()
            self._out = None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What the system refuses, in one line; what was written before stays."""
        try:
            yield
        except FileExistsError:
            raise UsageError(f"'{shown(self._path)}' is there already; give another file") from None
        except (OSError, ValueError) as error:
            out, self._out = self._out, None
            left = ""
            if out is not None:
                out.abandon()
                left = "; `mcap recover` makes a whole recording of what it has"
            raise VtpError(f"cannot write '{shown(self._path)}': {reason(error)}{left}") from None

    def __enter__(self) -> McapAnswers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Recording:
    """One file that is being written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._writer = _load_writer()(self._file, chunk_size=_IN_MEMORY)
        self._writer.start(profile="ros2", library="vtp")
        schema = self._writer.register_schema(STRING, "ros2msg", _DEFINITION)
        self._channels = [
            self._writer.register_channel(topic, "cdr", schema) for topic in (ANSWER, ANSWER_JSON)
        ]

    def write(self, stamp: int, number: int, texts: Sequence[str]) -> None:
        """A text for each channel, at `stamp` nanoseconds."""
        for channel, text in zip(self._channels, texts, strict=True):
            self._writer.add_message(channel, stamp, string_message(text), stamp, number)
        self._file.flush()

    def end(self) -> None:
        self._writer.finish()
        self._file.close()

    def abandon(self) -> None:
        with suppress(OSError):
            self._file.close()


def _load_writer() -> Any:
    """The library's class that writes. Raises VtpError without the library."""
    try:
        from mcap.writer import Writer
    except ImportError:
        raise VtpError(
            "recordings need mcap, which is not installed; run: pip install 'vtp-edge[mcap]'"
        ) from None
    return Writer
