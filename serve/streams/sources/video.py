"""Video through PyAV: files, v4l2 cameras, and streams of the network, which come back after they were lost.

A file, or a recording that a server gives whole, is played in real time unless every frame is wanted. Of a
stream that lives, frames have the time of this machine at which they came.
"""

from __future__ import annotations

import errno
import importlib
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import shown
from vtp.runtime.media.images import MAX_PIXELS, excess
from vtp.serve.streams.frames import MEDIA, UNIX, Frame
from vtp.serve.streams.sources.names import source_name
from vtp.serve.streams.sources.pacing import Pace

_OPEN, _READ = 10.0, 10.0  # seconds without a byte from the network after which a stream is lost
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0  # seconds before trying again, doubled each time
_QUARTERS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))  # turned to the left, as in _matrix
_BAD_PACKETS = 100  # one after the other; then a stream is lost
# What a stream may use; not "file", or a server's playlist could name this machine's files.
_NETWORK = "crypto,data,ffrtmphttp,http,httpproxy,https,rtmp,rtmps,rtmpt,rtmpts,rtp,srt,srtp,tcp,tls,udp"
# No time is spent on guessing at a live stream, and nothing is held back.
_LIVE = {
    "rtsp_transport": "tcp",
    "fflags": "nobuffer",
    "flags": "low_delay",
    "protocol_whitelist": _NETWORK,
}
# FFmpeg's formats that name other files, instead of holding the pictures.
_NAMING_OTHERS = {
    "concat",
    "dash",
    "hls",
    "image2",
    "imf",
    "lavfi",
    "rtsp",
    "sap",
    "sdp",
    "webm_dash_manifest",
}


@dataclass(frozen=True)
class Address:
    """What PyAV opens.

    url     a URL, "file:" and a path, or a device's path
    name    how messages call it
    format  of a device: "v4l2"; None: FFmpeg finds out
    remote  whether it comes over a network
    """

    url: str
    name: str
    format: str | None = None
    remote: bool = False

    @classmethod
    def of(cls, url: str, name: str | None = None, format: str | None = None) -> Address:
        """With the name that `source_name` gives, if none is given."""
        remote = "://" in url and not url.startswith("file:")
        return cls(url, source_name(url) if name is None else name, format, remote)


class Lost(Exception):
    """A stream that lived has ended, or fell silent; its text says how."""


class VideoSource:
    """Frames of one address.

    every_frame  play as fast as frames are taken, instead of in real time; refused of live streams
    tell         called with a line when a live stream is lost, and when it is back

    The first opening must succeed; after that, a live stream that is lost is opened again and again, with
    longer and longer pauses, until `close`.
    """

    def __init__(
        self, address: Address, every_frame: bool = False, tell: Callable[[str], None] = lambda line: None
    ) -> None:
        """Open it. Raises UsageError or VtpError if it cannot be opened, or is not a video."""
        self.name = address.name
        self._address, self._every_frame, self._tell = address, every_frame, tell
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._number = 0
        self._lost: float | None = None  # since when; None: it gives frames
        self._delay = _FIRST_DELAY
        self._opened: Opened | None = _open_aside(address)
        if every_frame and self._opened.live:
            self._opened.close()
            raise UsageError(
                f"--every-frame is for recordings, and {self.name} is live: frames would pile up; leave it "
                "out"
            )

    def __iter__(self) -> Iterator[Frame]:
        """Decode; the iteration ends with the file, a live stream's with `close`."""
        opened = self._unread()
        while opened is not None and not self._closed.is_set():
            try:
                yield from self._frames(opened)
                self._note_left_out(opened)
                return
            except Lost as error:
                self._note_loss(str(error))
            finally:
                opened.close()
            opened = self._opened_again()

    def close(self) -> None:
        """End the iteration, at the latest when a read that hangs has timed out."""
        self._closed.set()
        if (opened := self._unread()) is not None:
            opened.close()

    def _unread(self) -> Opened | None:
        """The first opening, for the one who asks first; what is being read is its reader's to close."""
        with self._lock:
            opened, self._opened = self._opened, None
            return opened

    def _frames(self, opened: Opened) -> Iterator[Frame]:
        paced = not opened.live and not self._every_frame
        pace = Pace(self._closed, name=self.name, tell=self._tell) if paced else None
        for picture, seconds in opened.decoded():
            if self._closed.is_set() or (pace is not None and not pace.wait(seconds)):
                return
            if self._lost is not None:
                self._note_return()
            stamp, clock = (time.time_ns(), UNIX) if opened.live else (round(seconds * 1e9), MEDIA)
            yield Frame(picture, self._number, stamp, time.monotonic(), clock)
            self._number += 1

    def _note_left_out(self, opened: Opened) -> None:
        if opened.left_out:
            self._tell(f"{opened.left_out} packets of {self.name} could not be decoded and were left out")

    def _note_loss(self, why: str) -> None:
        """Tell it, once for all attempts that bring no frame."""
        if self._lost is None:
            self._lost = time.monotonic()
            self._tell(f"lost {self.name}: {why}; trying to reach it again")

    def _note_return(self) -> None:
        assert self._lost is not None
        self._tell(f"{self.name} is back after {time.monotonic() - self._lost:.1f} s")
        self._lost, self._delay = None, _FIRST_DELAY

    def _opened_again(self) -> Opened | None:
        """The stream, as soon as it can be opened; None once it is closed."""
        while not self._closed.wait(self._delay):
            self._delay = min(2 * self._delay, _LONGEST_DELAY)
            try:
                return Opened(self._address)
            except VtpError:
                continue
        return None


class Opened:
    """One connection, or one open file.

    live      whether frames come when they are taken: of a camera, and of streams without an end
    left_out  packets that could not be decoded
    """

    def __init__(self, address: Address) -> None:
        """Open it and find its pictures. Raises UsageError or VtpError."""
        self._av = load_av()
        self._name = address.name
        self.left_out = 0
        options = self._of_a_file() if address.url.startswith("file:") else _LIVE
        timeout = (_OPEN, _READ) if address.remote else None
        try:
            self._container = self._av.open(
                address.url,
                format=address.format,
                options=dict(options),
                timeout=timeout,
                metadata_errors="ignore",  # titles and the like in any encoding, which nobody reads here
            )
        except self._av.error.FFmpegError as error:
            barred = "format_whitelist" in options and isinstance(error, self._av.error.ArgumentError)
            late = f"no picture came in {_OPEN:g} s" if _timed_out(self._av, error) else _why(error)
            why = _NAMES_OTHERS if barred else late
            cure = _CAMERA_CURES.get(error.errno, _CURE) if address.format else _CURE
            raise VtpError(f"cannot open {address.name}: {why}; {cure}") from None
        except (ValueError, OSError) as error:
            raise VtpError(f"cannot open {address.name}: {shown(error)}; {_CURE}") from None
        self.live = address.format is not None or (address.remote and not self._container.duration)
        try:
            self._stream = self._first_stream()
        except BaseException:
            self._container.close()
            raise

    def close(self) -> None:
        """Give the connection back."""
        self._container.close()

    def decoded(self) -> Iterator[tuple[Callable[[], np.ndarray], float]]:
        """Pictures, each as a function that gives it as uint8 [H,W,3], and seconds since the first one.

        Raises `Lost` if a live stream ends, VtpError for a file that turns out damaged, or without pictures.
        """
        first: float | None = None
        with self._ending():
            for number, frame in enumerate(self._decode()):
                _check_size(frame, self._name)
                seconds = frame.time if frame.time is not None else number / self._rate
                first = seconds if first is None else first
                yield _picture_of(frame), max(0.0, seconds - first)
        if self.live:
            raise Lost("it ended")
        if first is None:
            why = f"{self.left_out} packets could not be decoded" if self.left_out else "it is empty"
            raise VtpError(f"{self._name} gave no picture: {why}; give another video")

    def _of_a_file(self) -> dict[str, str]:
        """Options with which FFmpeg opens one file and no other."""
        formats = ",".join(sorted(self._av.formats_available - _NAMING_OTHERS))
        return {"protocol_whitelist": "file", "format_whitelist": formats}

    @property
    def _rate(self) -> float:
        return float(self._stream.average_rate or self._stream.guessed_rate or 25)

    def _first_stream(self) -> Any:
        cover = self._av.stream.Disposition.attached_pic
        streams = [one for one in self._container.streams.video if not one.disposition & cover]
        if not streams:
            raise VtpError(f"{self._name} has no pictures, only sound or data; give a video")
        if streams[0].codec_context is None:
            raise VtpError(
                f"{self._name} holds video in an encoding that this FFmpeg has no decoder for; convert it, "
                "to H.264 for example"
            )
        _check_size(streams[0], self._name)
        streams[0].codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        return streams[0]

    def _decode(self) -> Iterator[Any]:
        """Frames; a packet that cannot be decoded is left out."""
        bad = 0
        for packet in self._container.demux(self._stream):
            try:
                frames = packet.decode()
            except self._av.error.InvalidDataError:
                bad, self.left_out = bad + 1, self.left_out + 1
                if bad >= _BAD_PACKETS:
                    raise
                continue
            bad = 0 if frames else bad
            yield from frames

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """What FFmpeg says while it reads, as `Lost` or VtpError."""
        try:
            yield
        except self._av.error.FFmpegError as error:
            why = f"nothing came for {_READ:g} s" if _timed_out(self._av, error) else _why(error)
            if self.live:
                raise Lost(why) from None
            raise VtpError(f"{self._name} is damaged: {why}; the frames before were read") from None


def _open_aside(address: Address) -> Opened:
    """`Opened`, in a thread of its own: what FFmpeg waits for, Ctrl-C and SIGTERM would not end."""
    opened: Future[Opened] = Future()

    def work() -> None:
        try:
            opened.set_result(Opened(address))
        except BaseException as error:  # for the thread that waits to raise
            opened.set_exception(error)

    threading.Thread(target=work, name="vtp-opening", daemon=True).start()
    try:
        return opened.result()
    except BaseException:
        opened.add_done_callback(_close_unwanted)
        raise


def _close_unwanted(opened: Future[Opened]) -> None:
    if opened.exception() is None:
        opened.result().close()


_NAMES_OTHERS = "it is a playlist, whose files and URLs are not opened, or it is damaged"
_CURE = "give a video file, a folder of pictures, a camera such as /dev/video0, or an rtsp:// or http:// URL"
_OTHER_NODE = (
    "it is not a camera that gives pictures. A camera often has several /dev/video*, of which one does: try "
    "the others (v4l2-ctl --list-devices names them)"
)
# Of a device file, by what the system says.
_CAMERA_CURES = {
    errno.EACCES: 'join the group of cameras (sudo usermod -aG video "$USER"), log out and in again',
    errno.EBUSY: "another program has it (fuser -v /dev/video* names it): end that one first",
    errno.ENODEV: _OTHER_NODE,
    errno.ENOTTY: _OTHER_NODE,
    errno.EINVAL: _OTHER_NODE,
}


def load_av() -> Any:
    """PyAV. Raises VtpError where it is not installed."""
    try:
        return importlib.import_module("av")
    except ImportError:
        raise VtpError(
            "video needs PyAV, which is not installed; run: pip install 'vtp-edge[streams]'"
        ) from None


def _why(error: Any) -> str:
    """FFmpeg's reason, without the URL that its text ends with."""
    return shown(getattr(error, "strerror", None) or type(error).__name__, 100)


def _timed_out(av: Any, error: BaseException) -> bool:
    return isinstance(error, av.error.ExitError | TimeoutError)


def _check_size(picture: Any, name: str) -> None:
    """Refuse what is larger than any picture may be. Raises VtpError."""
    if too_large := excess(picture.width, picture.height, MAX_PIXELS):
        raise UsageError(f"{name} has frames of {too_large}: give smaller ones")


def _picture_of(frame: Any) -> Callable[[], np.ndarray]:
    """The conversion to RGB, or RGBA, put off: of most frames nobody asks for it."""

    def picture() -> np.ndarray:
        """The frame as uint8 [H,W,3] or [H,W,4], upright; VtpError for pixels that cannot be converted."""
        transparent = any(component.is_alpha for component in frame.format.components)
        try:
            pixels = frame.to_ndarray(format="rgba" if transparent else "rgb24")
        except Exception as error:  # of formats that FFmpeg's scaler does not know
            raise VtpError(
                f"its pixels ({frame.format.name}) cannot be turned into RGB: {type(error).__name__}"
            ) from error
        return upright(pixels, _matrix(frame))

    return picture


def _matrix(frame: Any) -> tuple[int, int, int, int]:
    """How a viewer turns and mirrors it, (a, b, c, d): (x, y) is shown at (a x + c y, b x + d y)."""
    with suppress(ValueError):  # it has data of a kind that PyAV does not know
        if (data := frame.side_data.get("DISPLAYMATRIX")) is not None:
            a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
            return a, b, c, d
    return _QUARTERS[round(frame.rotation / 90) % 4]


def upright(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Pixels [H,W,C] turned by quarters and mirrored as a display matrix says."""
    a, b, c, d = matrix
    across = abs(b) + abs(c) > abs(a) + abs(d)
    turned = pixels.swapaxes(0, 1) if across else pixels
    right, down = (c, b) if across else (a, d)
    turned = turned[:, ::-1] if right < 0 else turned
    return np.ascontiguousarray(turned[::-1] if down < 0 else turned)
