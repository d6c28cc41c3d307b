"""A robot's recording: the pictures of one topic of an MCAP file, played as they came."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import shown
from vtp.runtime.media.images import open_regular
from vtp.serve.robots.cdr import COMPRESSED, IMAGE
from vtp.serve.streams.frames import Frame
from vtp.serve.streams.sources.messages import frame_of
from vtp.serve.streams.sources.names import source_name
from vtp.serve.streams.sources.pacing import Pace

_LARGEST = 2**30  # bytes of one record


class RecordingSource:
    """Frames of one topic, which has the type sensor_msgs/Image or CompressedImage.

    Stamps and names are those of the messages' headers (the log's time where a header has none); frames come
    when they were recorded, counted from the first, or, with `every_frame`, as fast as they are taken.
    """

    def __init__(self, file: Path, topic: str | None, every_frame: bool = False) -> None:
        """Look for the topic. Raises UsageError or VtpError."""
        open_regular(file).close()
        self._file, self._every_frame = file, every_frame
        self._closed = threading.Event()
        self._topic = self._chosen(topic)
        self.name = source_name(f"mcap:{file}#{self._topic}")

    def __iter__(self) -> Iterator[Frame]:
        """Read on; pictures are decoded when they are asked about."""
        pace = None if self._every_frame else Pace(self._closed)
        with self._reader() as reader:
            messages = reader.iter_messages(topics=[self._topic])
            for number, (schema, _, message) in enumerate(messages):
                if self._closed.is_set() or (pace is not None and not pace.wait(message.log_time / 1e9)):
                    return
                yield frame_of(number, schema.name, message.data, message.log_time)

    def close(self) -> None:
        """End the iteration."""
        self._closed.set()

    def _chosen(self, topic: str | None) -> str:
        """The topic that was asked for, or the only one with pictures."""
        with self._reader() as reader:
            summary = reader.get_summary()
        if summary is None:
            raise VtpError(
                f"{shown(self._file)} was not finished; `mcap recover` makes a whole recording of it"
            )
        kinds = {one.topic: _kind(summary, one) for one in summary.channels.values()}
        pictures = sorted(name for name, kind in kinds.items() if kind in (IMAGE, COMPRESSED))
        there = f"its topics with pictures: {', '.join(pictures) or 'none'}"
        if topic is None and len(pictures) == 1:
            return pictures[0]
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
    def _reader(self) -> Iterator[Any]:
        """The file, opened; what the library says of it as VtpError."""
        try:
            from mcap.exceptions import McapError
            from mcap.reader import SeekingReader
        except ImportError:
            raise VtpError(
                "recordings need mcap, which is not installed; run: pip install 'vtp-edge[mcap]'"
            ) from None
        with self._file.open("rb") as file:
            try:
                yield SeekingReader(file, validate_crcs=True, record_size_limit=_LARGEST)
            except VtpError:
                raise
            except McapError as error:
                raise self._damaged(str(error) or type(error).__name__) from error
            except Exception as error:  # of decompressors, and of lengths that cannot be
                raise self._damaged(type(error).__name__) from error

    def _damaged(self, why: str) -> VtpError:
        return VtpError(f"{shown(self._file)} is not a whole MCAP file: {shown(why, 100)}; give another one")


def _kind(summary: Any, channel: Any) -> str:
    """A channel's type, with its encoding if that is not served."""
    schema = summary.schemas.get(channel.schema_id)
    name = schema.name if schema else "messages without a type"
    return name if channel.message_encoding == "cdr" else f"{name} in {channel.message_encoding or 'bytes'}"
