"""A topic of an MCAP recording (Foxglove's format, rosbag2's own since Iron), without ROS."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import shown
from vtp.runtime.media.images import open_regular, reason
from vtp.serve.robots.cdr import COMPRESSED, IMAGE, picture_from
from vtp.serve.robots.images import picture_of
from vtp.serve.streams.frames import ROS, Frame
from vtp.serve.streams.sources.names import source_name
from vtp.serve.streams.sources.pacing import Pace

__all__ = ["PREFIX", "McapSource", "check_mcap", "load_mcap"]

PREFIX = "mcap:"
_PICTURES = (IMAGE, COMPRESSED)
_LARGEST_CHUNK = 1 << 30  # bytes, once it is decompressed


def load_mcap() -> Any:
    """The library. Raises VtpError, with what to install, where it is missing."""
    try:
        import mcap.exceptions
        import mcap.reader
        import mcap.writer
    except ImportError as error:
        raise VtpError(
            f"MCAP needs {error.name}, which is not installed; run: pip install 'vtp-edge[mcap]'"
        ) from error
    return mcap


def check_mcap(text: str) -> None:
    """UsageError for a file that cannot be opened, as far as that shows without reading it."""
    _opened(_split(text)[0]).close()


class McapSource:
    """The pictures of one topic, at the pace at which they were recorded.

    Frames are numbered as recorded; their stamps are the headers' own, or the log's where a header has none.
    """

    def __init__(self, text: str, every_frame: bool = False) -> None:
        """Open a recording and find the topic.

        text         "mcap:FILE#TOPIC"; the topic may be left out if only one has pictures
        every_frame  play as fast as frames are taken, instead of as recorded

        Raises UsageError for a file or topic that is not there, VtpError for one that cannot be read.
        """
        path, topic = _split(text)
        self.name = source_name(text)
        self._mcap, self._every_frame = load_mcap(), every_frame
        self._closed, self._begun = threading.Event(), False
        self._file = _opened(path)
        try:
            self._topic = self._find(topic)
        except BaseException:
            self._file.close()
            raise

    def __iter__(self) -> Iterator[Frame]:
        """A frame for each message, which is decoded only if it is asked about."""
        pace = None if self._every_frame else Pace(self._closed)
        self._begun = True
        with self._file:
            for number, (kind, message) in enumerate(self._messages()):
                if self._closed.is_set() or (pace is not None and not pace.wait(message.log_time / 1e9)):
                    return
                yield _frame(number, kind, message)

    def close(self) -> None:
        """End the iteration."""
        self._closed.set()
        if not self._begun:
            self._file.close()

    def _messages(self) -> Iterator[tuple[str, Any]]:
        """The topic's messages, each with its type, as they were logged."""
        messages = self._reader.iter_messages(topics=[self._topic])
        while True:
            try:
                schema, channel, message = next(messages)
            except StopIteration:
                return
            except Exception as error:  # of damaged data the library and its decompressors raise many kinds
                raise self._damaged(error) from error
            if (kind := _kind(channel, schema)) in _PICTURES:
                yield kind, message

    def _find(self, wanted: str | None) -> str:
        """The topic that is wanted, or the only one. Raises UsageError with those that there are."""
        kinds = self._topics()
        pictures = sorted(topic for topic, kind in kinds.items() if kind in _PICTURES)
        there = "no topic has pictures"
        if pictures:
            there = f"topics with pictures are {', '.join(map(shown, pictures))}"
        if wanted is None:
            if len(pictures) != 1:
                raise UsageError(f"{self.name} needs a topic: {there}; give {PREFIX}FILE#TOPIC")
            return pictures[0]
        if wanted not in kinds:
            raise UsageError(f"{self.name}: there is no such topic; {there}")
        if wanted not in pictures:
            raise UsageError(
                f"{self.name} has messages of type {shown(kinds[wanted])}, and {IMAGE} and {COMPRESSED} are "
                f"served in CDR; {there}"
            )
        return wanted

    def _topics(self) -> dict[str, str]:
        """Begin to read. Topic -> its message's type, or its encoding where that is not CDR."""
        try:
            self._reader = self._mcap.reader.make_reader(self._file, validate_crcs=True)
            summary = self._reader.get_summary()
        except Exception as error:
            raise self._damaged(error) from error
        if summary is None:
            raise VtpError(
                f"{self.name} has no index: its recording did not end well; run: mcap recover FILE -o NEW"
            )
        for chunk in summary.chunk_indexes:
            if chunk.uncompressed_size > _LARGEST_CHUNK:
                raise VtpError(
                    f"{self.name} has a chunk of {chunk.uncompressed_size:,} bytes; at most "
                    f"{_LARGEST_CHUNK:,} are read at once"
                )
        return {
            channel.topic: _kind(channel, summary.schemas.get(channel.schema_id))
            for channel in summary.channels.values()
        }

    def _damaged(self, error: Exception) -> VtpError:
        why = shown(reason(error), 120) if not isinstance(error, struct.error) else "it is cut off"
        return VtpError(f"{self.name} is no MCAP recording, or a damaged one: {why}")


def _frame(number: int, kind: str, message: Any) -> Frame:
    """A message's frame; of one that is damaged, `load` says so."""
    now = time.monotonic()
    try:
        picture = picture_from(kind, message.data)
    except VtpError as error:
        return Frame(partial(_refuse, error), number, message.log_time, now, ROS)
    stamp = picture.stamp_ns or message.log_time
    return Frame(partial(picture_of, picture), number, stamp, now, ROS, picture.frame_id)


def _refuse(error: VtpError) -> Any:
    raise error


def _kind(channel: Any, schema: Any) -> str:
    if channel.message_encoding != "cdr":
        return f"{channel.message_encoding or 'unknown'} (encoding)"
    return str(schema.name) if schema is not None else "unknown"


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise UsageError(f"no such file: '{shown(path)}'; give a recording") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read '{shown(path)}': {reason(error)}") from None


def _split(text: str) -> tuple[Path, str | None]:
    """File and topic of "mcap:FILE#TOPIC"; a file may have a # in its own name if a topic follows."""
    file, mark, topic = text.removeprefix(PREFIX).rpartition("#")
    if not mark:
        file, topic = topic, ""
    if not file:
        raise UsageError(f"'{source_name(text)}' names no file; give {PREFIX}FILE#TOPIC")
    return Path(file), topic or None
