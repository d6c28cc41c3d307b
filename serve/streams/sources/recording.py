"""A robot's recording: the pictures of one topic of an MCAP file, played as they came."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import shown
from vtp.runtime.media.images import open_regular
from vtp.serve.robots.cdr import COMPRESSED, IMAGE
from vtp.serve.streams.frames import Frame
from vtp.serve.streams.sources.chunks import LARGEST, Damaged, read_messages
from vtp.serve.streams.sources.messages import frame_of
from vtp.serve.streams.sources.names import source_name
from vtp.serve.streams.sources.pacing import Pace

_MAGIC = b"\x89MCAP0\r\n"  # the first bytes of a file, and the last of one that was finished


class RecordingSource:
    """Frames of one topic, which has the type sensor_msgs/Image or CompressedImage.

    Stamps and names are those of the messages' headers (the log's time where a header has none); frames come
    when they were recorded, counted from the first, or, with `every_frame`, as fast as they are taken.

    tell  called with a line before a long wait for the next frame
    """

    def __init__(
        self,
        file: Path,
        topic: str | None,
        every_frame: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Look for the topic. Raises UsageError or VtpError."""
        open_regular(file).close()
        self._file, self._every_frame, self._tell = file, every_frame, tell
        self._closed = threading.Event()
        with self._opened() as opened:
            summary = self._summary(opened)
        self._indexes = summary.chunk_indexes
        self._topic = self._chosen(summary, topic)
        self._kinds = {
            number: _kind(summary, channel)
            for number, channel in summary.channels.items()
            if channel.topic == self._topic and _is_picture(summary, channel)
        }
        self.name = source_name(f"mcap:{file}#{self._topic}")

    def __iter__(self) -> Iterator[Frame]:
        """Read on; pictures are decoded when they are asked about. Raises VtpError for a file that turns out
        damaged, or without a picture on the topic."""
        pace = None if self._every_frame else Pace(self._closed, name=self.name, tell=self._tell)
        number = 0
        with self._opened() as file:
            for message in read_messages(file, self._indexes, self._kinds):
                if self._closed.is_set() or (pace is not None and not pace.wait(message.log_time / 1e9)):
                    return
                yield frame_of(number, self._kinds[message.channel], message.data, message.log_time)
                number += 1
        if not number:
            raise VtpError(f"{self.name} gave no picture: nothing was recorded; give another recording")

    def close(self) -> None:
        """End the iteration."""
        self._closed.set()

    def _summary(self, file: BinaryIO) -> Any:
        """What the end of the file says of it. Raises VtpError for one that has no end."""
        from mcap.reader import SeekingReader

        summary = None
        if _is_finished(file):
            reader = SeekingReader(file, validate_crcs=True, record_size_limit=LARGEST)
            summary = reader.get_summary()
        if summary is None:
            raise VtpError(
                f"{shown(self._file)} is not a whole MCAP file: it was not finished, or is cut off; `mcap "
                "recover` makes a whole recording of what it has"
            )
        return summary

    def _chosen(self, summary: Any, topic: str | None) -> str:
        """The topic that was asked for, or the only one with pictures."""
        kinds = {one.topic: _kind(summary, one) for one in summary.channels.values()}
        pictures = sorted({one.topic for one in summary.channels.values() if _is_picture(summary, one)})
        there = f"its topics with pictures: {', '.join(pictures) or 'none'}"
        if topic is None and len(pictures) == 1:
            return pictures[0]
        if topic is None and not pictures:
            held = ", ".join(sorted(set(kinds.values()))) or "nothing"
            raise UsageError(
                f"{shown(self._file)} has no pictures: it holds {shown(held)}, and {IMAGE} and "
                "CompressedImage in CDR are served"
            )
        if topic is None:
            raise UsageError(f"name a topic of {shown(self._file)}, as mcap:FILE#TOPIC; {shown(there)}")
        if topic not in kinds:
            raise UsageError(f"{shown(self._file)} has no topic '{shown(topic)}'; {shown(there)}")
        if topic not in pictures:
            raise UsageError(
                f"'{shown(topic)}' holds {shown(kinds[topic])}, and {IMAGE} and CompressedImage in CDR are "
                f"served; {shown(there)}"
            )
        return topic

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The file, opened; what the library says of it as VtpError."""
        try:
            from mcap.exceptions import McapError
        except ImportError:
            raise VtpError(
                "recordings need mcap, which is not installed; run: pip install 'vtp-edge[mcap]'"
            ) from None
        with self._file.open("rb") as file:
            try:
                yield file
            except VtpError:
                raise
            except (McapError, Damaged) as error:
                raise self._damaged(str(error) or type(error).__name__) from error
            except Exception as error:  # of decompressors, and of lengths that cannot be
                raise self._damaged(type(error).__name__) from error

    def _damaged(self, why: str) -> VtpError:
        return VtpError(f"{shown(self._file)} is not a whole MCAP file: {shown(why, 100)}; give another one")


def _is_finished(file: BinaryIO) -> bool:
    """Whether a file that begins as MCAP ends so; the library says of any other what it is."""
    begins = file.read(len(_MAGIC)) == _MAGIC
    size = file.seek(0, 2)
    file.seek(max(0, size - len(_MAGIC)))
    ends = file.read() == _MAGIC and size > 2 * len(_MAGIC)
    file.seek(0)
    return ends or not begins


def _kind(summary: Any, channel: Any) -> str:
    """A channel's type, with its encoding if that is not served."""
    schema = summary.schemas.get(channel.schema_id)
    name = schema.name if schema else "messages without a type"
    return name if channel.message_encoding == "cdr" else f"{name} in {channel.message_encoding or 'bytes'}"


def _is_picture(summary: Any, channel: Any) -> bool:
    return _kind(summary, channel) in (IMAGE, COMPRESSED)
