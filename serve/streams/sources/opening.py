"""From what a user writes as SOURCE to something that gives frames."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path

from vtp.engines import UsageError
from vtp.engines.errors import quoted_argument
from vtp.runtime.generation.arguments import is_number
from vtp.runtime.media.images import open_regular, reason
from vtp.serve.streams.frames import Source
from vtp.serve.streams.sources.folder import FolderSource
from vtp.serve.streams.sources.names import source_name
from vtp.serve.streams.sources.recording import RecordingSource
from vtp.serve.streams.sources.topic import TopicSource, read_address
from vtp.serve.streams.sources.video import Address, VideoSource

_MCAP, _ZENOH = "mcap:", "zenoh:"
_MOST_FPS = 31_536_000
_SCHEMES = ("rtsp", "rtsps", "http", "https", "rtmp", "rtmps", "rtp", "udp", "tcp", "srt")


def check_source(text: str | PathLike[str], fps: float | None = None) -> None:
    """Raise what `open_source` would, as far as that shows without opening anything."""
    text = _text_of(text)
    _check_fps(fps)
    if "://" in text:
        return _check_url(text)
    if text.startswith("ros2:"):
        raise UsageError(f"'{source_name(text)}' is a ROS 2 topic, which vtp-ros2 watches; use that command")
    if text.startswith(_ZENOH):
        read_address(text.removeprefix(_ZENOH))
        return
    if text.startswith(_MCAP):
        file, _ = _recording(text)
        if not file:
            raise UsageError(f"'{source_name(text)}' names no file; give mcap:FILE#TOPIC")
        return _check_file(Path(file))
    mode = _mode(Path(text))
    if fps is not None and not stat.S_ISDIR(mode):
        raise UsageError(f"--fps is for a folder of pictures, and {source_name(text)} is none; leave it out")
    if not stat.S_ISDIR(mode) and not stat.S_ISCHR(mode):
        _check_file(Path(text))


def open_source(
    text: str | PathLike[str],
    every_frame: bool = False,
    fps: float | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Source:
    """Open a source.

    text         /dev/video0, a URL, a video file, a folder of pictures, mcap:FILE#TOPIC, or zenoh:TOPIC
    every_frame  of files: no frame is dropped, and none has to wait for its time
    fps          of a folder: pictures a second; None: the next as soon as it can be taken
    tell         called with a line when a live stream is lost, and when it is back

    Raises UsageError for what is not a source, VtpError for what cannot be opened.
    """
    check_source(text, fps)
    text = _text_of(text)
    if "://" in text:
        return VideoSource(Address.of(text), every_frame, tell)
    if text.startswith(_ZENOH):
        _refuse_live(text, every_frame)
        return TopicSource(text.removeprefix(_ZENOH))
    if text.startswith(_MCAP):
        file, topic = _recording(text)
        return RecordingSource(Path(file), topic, every_frame, tell)
    path, name = Path(text), source_name(text)
    if path.is_dir():
        return FolderSource(path, fps)
    if path.is_char_device():
        return VideoSource(Address(str(path), name, "v4l2"), every_frame, tell)
    # Without "file:", FFmpeg would read a name such as concat:a|b in its own way.
    return VideoSource(Address(f"file:{path.absolute()}", name), every_frame, tell)


def _text_of(source: object) -> str:
    """SOURCE as text. Raises UsageError for what is none, and for empty text, which would mean "."."""
    text = fspath(source) if isinstance(source, PathLike) else source
    if not isinstance(text, str) or not text.strip():
        raise UsageError(
            f"{quoted_argument(source)} is not a source; give a video, a folder of pictures, a camera such "
            "as '/dev/video0' or a URL, as text"
        )
    return text


def _check_fps(fps: object) -> None:
    if fps is not None and (not is_number(fps) or not 0 < fps <= _MOST_FPS):
        raise UsageError(f"fps {quoted_argument(fps)} is not a number above 0, up to {_MOST_FPS}")


def _refuse_live(text: str, every_frame: bool) -> None:
    """Raise UsageError for a topic of which every frame is wanted."""
    if every_frame:
        raise UsageError(
            f"--every-frame is for recordings, and {source_name(text)} is live: frames would pile up; leave "
            "it out"
        )


def _recording(text: str) -> tuple[str, str | None]:
    """File and topic of mcap:FILE#TOPIC."""
    file, _, topic = text.removeprefix(_MCAP).partition("#")
    return file, topic or None


def _check_url(text: str) -> None:
    scheme = text.partition("://")[0].lower()
    if scheme not in _SCHEMES:
        raise UsageError(
            f"'{source_name(text)}' is of a kind that is not served; URLs may begin with "
            f"{', '.join(f'{name}://' for name in _SCHEMES)}"
        )


def _mode(path: Path) -> int:
    """What kind of file a path is. Raises UsageError."""
    with _errors_of(path):
        return path.stat().st_mode
    raise AssertionError  # for mypy: errors are never swallowed


def _check_file(path: Path) -> None:
    """Raise UsageError unless it is a file that can be read."""
    if not stat.S_ISREG(_mode(path)):
        raise UsageError(
            f"{source_name(str(path))} is not a regular file; give a video, a folder of pictures, a camera "
            "or a URL"
        )
    with _errors_of(path):
        open_regular(path).close()


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Say what the system says of a path as UsageError."""
    try:
        yield
    except FileNotFoundError:
        raise UsageError(_missing(path)) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {source_name(str(path))}: {reason(error)}") from None


def _missing(path: Path) -> str:
    name = source_name(str(path))
    cameras = sorted(str(one) for one in Path("/dev").glob("video[0-9]*"))
    there = f"there are {', '.join(cameras)}" if cameras else "this machine has none at /dev/video*"
    if str(path).startswith("/dev/") or str(path).isdecimal():
        return f"no such camera: {name}; {there}"
    return f"no such file or folder: {name}; give a video, a folder of pictures, a camera or a URL"
