"""A folder of pictures, one frame each, in the order of their names."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

from vtp.runtime.media.videos import picture_files
from vtp.serve.streams.frames import UNIX, Frame
from vtp.serve.streams.sources.names import source_name
from vtp.serve.streams.sources.pacing import Pace


class FolderSource:
    """The pictures of a folder; numbers in names count by their value.

    fps  pictures a second, as a camera would give them; None: the next one as soon as it can be taken
    """

    def __init__(self, folder: Path, fps: float | None = None) -> None:
        """Look into the folder. Raises UsageError for one without pictures."""
        self.name = source_name(str(folder))
        self._files = picture_files(folder)
        self._fps = fps
        self.every_frame = fps is None
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[Frame]:
        """A frame for each picture, which is decoded when it is asked about."""
        pace = Pace(self._closed)
        for number, file in enumerate(self._files):
            if self._closed.is_set() or (self._fps and not pace.wait(number / self._fps)):
                return
            yield Frame(file, number, _changed_at(file), time.monotonic(), UNIX, file.name)

    def close(self) -> None:
        """End the iteration."""
        self._closed.set()


def _changed_at(file: Path) -> int:
    """A file's time in nanoseconds since 1970; now, if it has gone or cannot be looked at."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return time.time_ns()
