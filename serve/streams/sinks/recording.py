"""Answers as an MCAP recording, which lies beside that of the pictures in Foxglove and rosbag2."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import shown
from vtp.runtime.media.images import reason
from vtp.serve.robots.cdr import STRING, string_message
from vtp.serve.streams.answer import FrameAnswer

__all__ = ["McapAnswers"]

_DEFINITION = b"string data\n"
ANSWER, ANSWER_JSON = "/vtp/answer", "/vtp/answer_json"


class McapAnswers:
    """A sink that writes each answer as two std_msgs/String: its text, and its JSON.

    Both are logged at the time of the answer's frame, so that they lie beside it. A context manager; a
    recording that did not end well (the process was killed) lacks its index, and `mcap recover` makes it.
    """

    def __init__(self, path: Path) -> None:
        """Begin a file. Raises UsageError if it is there already, or cannot be made,
        and VtpError without the library."""
        try:
            from mcap.writer import Writer
        except ImportError:
            raise VtpError(
                "recordings need mcap, which is not installed; run: pip install 'vtp-edge[mcap]'"
            ) from None
        try:
            self._file = path.open("xb")
        except FileExistsError:
            raise UsageError(f"'{shown(path)}' is there already; give another file") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot write '{shown(path)}': {reason(error)}") from None
        self._writer = Writer(self._file)
        self._writer.start(profile="ros2", library="vtp")
        schema = self._writer.register_schema(STRING, "ros2msg", _DEFINITION)
        self._channels = [
            self._writer.register_channel(topic, "cdr", schema) for topic in (ANSWER, ANSWER_JSON)
        ]

    def __call__(self, answer: FrameAnswer) -> None:
        """Write one."""
        told = json.dumps(answer.to_json(), ensure_ascii=False)
        for channel, text in zip(self._channels, (answer.text, told), strict=True):
            stamp = max(0, answer.frame.stamp_ns)
            self._writer.add_message(channel, stamp, string_message(text), stamp, answer.frame.number)

    def close(self) -> None:
        """Write the index and end the file."""
        with self._file:
            self._writer.finish()

    def __enter__(self) -> McapAnswers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
