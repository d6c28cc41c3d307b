"""What was kept, shown: a picture of every frame asked about, or one video of them all.

The video's time is the frames' own: it shows each until the next one that was asked about, for five seconds
at most, so that an hour in which a gate held all back is no hour of video.
"""

from __future__ import annotations

import os
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image, ImageOps

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import shown
from vtp.runtime.bundle.folder import check_outside
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.media.images import reason
from vtp.runtime.media.show_kept import check_one_view, save_picture, show_kept
from vtp.serve.streams.answer import FrameAnswer
from vtp.serve.streams.frames import UNIX, Frame
from vtp.serve.streams.sources.video import load_av

__all__ = ["KeptPictures", "KeptVideo", "check_kept", "is_video"]

# By the file's suffix: FFmpeg's format and its options. Of an .mkv a second or two are in memory.
_FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    ".mp4": ("mp4", {}),
    ".mkv": ("matroska", {"cluster_time_limit": "1000", "flush_packets": "1"}),
}
_OTHERS = {".avi", ".bmp", ".gif", ".jpeg", ".jpg", ".m4v", ".mov", ".mpeg", ".mpg", ".png", ".webm", ".webp"}
# The first that FFmpeg has: some builds leave out what is under the GPL. Packets come out at once, so that
# little is in memory, and one thread leaves the others to the model.
_ENCODERS = {
    "libx264": {"preset": "veryfast", "crf": "23", "tune": "zerolatency"},
    "mpeg4": {"qmin": "2", "qmax": "4"},
}
_LARGEST = 1920  # pixels of the longer edge
_MILLISECOND = Fraction(1, 1000)
_SECOND = 1000  # milliseconds
_LEAST, _MOST = 10, 5 * _SECOND  # for which a frame is shown


def is_video(path: Path) -> bool:
    """Whether --show-kept asks for a video: by its suffix, unless a folder of that name is there."""
    return path.suffix.lower() in _FORMATS and not path.is_dir()


def check_kept(path: Path) -> None:
    """Refuse what can be refused of --show-kept before a model is loaded: UsageError, VtpError without PyAV
    or an encoder."""
    if path.suffix.lower() in _OTHERS and not path.is_dir():
        raise UsageError(
            f"--show-kept '{shown(path)}' is neither .mp4 nor .mkv; give a video of these, or a folder for "
            "pictures"
        )
    check_outside(path if is_video(path) else path / "frame.jpg")
    if not path.parent.is_dir():
        raise UsageError(f"the folder '{shown(path.parent)}' does not exist; make it first")
    if is_video(path):
        _check_new(path)
        _encoder(load_av())
    elif path.exists() and not path.is_dir():
        raise UsageError(f"--show-kept '{shown(path)}' is not a folder; give one")


class KeptPictures:
    """Writes a picture for every answer, `frame-NUMBER.jpg`, in which dropped patches are dimmed."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Make the folder, after `check_kept`. Raises VtpError for a bundle that shows no grid."""
        check_one_view(manifest.image)
        folder.mkdir(exist_ok=True)
        self._folder, self._manifest = folder, manifest

    def __call__(self, answer: FrameAnswer) -> None:
        """Write one."""
        picture = _drawn(answer, self._manifest)
        save_picture(picture, self._folder / f"frame-{answer.frame.number:08d}.jpg")


class KeptVideo:
    """Writes one video, which begins with the first answer and has its frame's size. A context manager."""

    def __init__(self, path: Path, manifest: Manifest, timeless: bool = False) -> None:
        """After `check_kept`. Raises VtpError for a bundle that shows no grid.

        timeless  the source has no time of its own, as a folder of pictures: each is shown for a second
        """
        check_one_view(manifest.image)
        self._path, self._manifest, self._timeless = path, manifest, timeless
        self._av = load_av()
        self._out: _Encoded | None = None
        self._shown: Frame | None = None
        self._at = 0  # milliseconds

    def __call__(self, answer: FrameAnswer) -> None:
        """Write one. Raises VtpError if the file cannot be written."""
        picture = _drawn(answer, self._manifest)
        if self._shown is not None:
            self._at += min(max(self._between(self._shown, answer.frame), _LEAST), _MOST)
        self._shown = answer.frame
        try:
            self._out = self._out or _Encoded(self._av, self._path, _even(picture.size))
            self._out.write(_fitted(picture, self._out.size), self._at)
        except (OSError, self._av.error.FFmpegError) as error:
            raise self._given_up(error) from None

    def close(self) -> None:
        """End the file, so that it can be played; without an answer there is none. Raises VtpError."""
        out, self._out = self._out, None
        if out is None:
            return
        try:
            out.end()
        except (OSError, self._av.error.FFmpegError) as error:
            self._out = out
            raise self._given_up(error) from None

    def _between(self, before: Frame, frame: Frame) -> int:
        """Milliseconds from one frame to another: by their stamps, but for what comes here as it is taken,
        and for files of a folder, whose stamps are the files' own."""
        if frame.clock != UNIX:
            return (frame.stamp_ns - before.stamp_ns) // 10**6
        return _SECOND if self._timeless else round((frame.arrived - before.arrived) * 1e3)

    def _given_up(self, error: Exception) -> VtpError:
        """Close what cannot be written on, and what to say. An .mp4 without its end cannot be played."""
        out, self._out = self._out, None
        left = ""
        if out is not None:
            out.abandon()
            left = "; it plays up to there"
            if self._path.suffix.lower() == ".mp4":
                self._path.unlink(missing_ok=True)
                left = "; it is removed, since it plays nowhere without its end (an .mkv does)"
        return VtpError(f"cannot write '{shown(self._path)}': {reason(error)}{left}")

    def __enter__(self) -> KeptVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Encoded:
    """One video file that is being written."""

    def __init__(self, av: Any, path: Path, size: tuple[int, int]) -> None:
        self.size, self._av = size, av
        _check_new(path)
        # Through a file of our own: FFmpeg takes some names for addresses, and overwrites.
        self._file = path.open("xb", buffering=0)
        try:
            name, options = _FORMATS[path.suffix.lower()]
            self._container = av.open(self._file, "w", format=name, options=options)
            self._stream = self._added(_encoder(av))
        except BaseException:
            self._file.close()
            path.unlink(missing_ok=True)
            raise

    def _added(self, encoder: str) -> Any:
        stream = self._container.add_stream(encoder, rate=30, options=_ENCODERS[encoder])
        stream.width, stream.height = self.size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = stream.time_base = _MILLISECOND
        return stream

    def write(self, picture: Image.Image, milliseconds: int) -> None:
        frame = self._av.VideoFrame.from_image(picture)
        frame.pts, frame.time_base = milliseconds, _MILLISECOND
        self._container.mux(self._stream.encode(frame))

    def end(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._file.close()

    def abandon(self) -> None:
        with suppress(Exception):  # what there was to say was said
            self._container.close()
        with suppress(OSError):
            self._file.close()


def _drawn(answer: FrameAnswer, manifest: Manifest) -> Image.Image:
    """The frame, with dropped patches dimmed."""
    rows, columns = manifest.visual.grid[:2]
    kept = [index for index in answer.kept if index >= 0]
    return show_kept(answer.picture(), manifest.image, (rows, columns), kept)


def _even(size: tuple[int, int]) -> tuple[int, int]:
    """A video's size for pictures of `size`: within the limit, and even, as colours are stored by fours."""
    scale = min(1.0, _LARGEST / max(size))
    width, height = (max(1, round(edge * scale)) for edge in size)
    return width + width % 2, height + height % 2


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture in the middle of a black one of `size`, as large as it can be; one that is a pixel narrower
    or lower keeps its own size."""
    if picture.size == size:
        return picture
    if not all(large - own in (0, 1) for large, own in zip(size, picture.size, strict=True)):
        picture = ImageOps.contain(picture, size)
    canvas = Image.new("RGB", size)
    canvas.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return canvas


def _check_new(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise UsageError(f"'{shown(path)}' is there already; give another file")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"'{shown(path)}' cannot be written; choose a path that you can write to")


def _encoder(av: Any) -> str:
    """The encoder to use. Raises VtpError without one."""
    for name in _ENCODERS:
        with suppress(av.codec.codec.UnknownCodecError):
            return str(av.Codec(name, "w").name)
    raise VtpError(
        f"this PyAV's FFmpeg has no video encoder ({' or '.join(_ENCODERS)}); give --show-kept a folder, "
        "or install PyAV's own wheel, which has both: pip install --force-reinstall av"
    )
