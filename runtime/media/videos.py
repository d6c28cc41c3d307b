"""Opening a video: whatever the caller holds becomes the frames that a bundle answers about.

Frames are taken as transformers takes them (`default_sample_indices_fn`): evenly, the first one always. A
video may be a list or an array of frames, a folder of pictures, an animated GIF or WebP through Pillow, or,
where OpenCV is installed, any file that it reads. Knows nothing about models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from PIL import Image

from vtp.engines.errors import UsageError, VtpError
from vtp.runtime.media.images import (
    ImageSource,
    as_bytes,
    check_image,
    identify,
    is_video,
    load_image,
    open_regular,
    path_of,
    plain_array,
    reason,
)
from vtp.runtime.media.tensors import Tensor, frames_of, is_tensor

__all__ = ["VideoSource", "check_video", "load_video", "picture_files", "sample_frames"]

#: What `load_video` takes: a path, a file's bytes, an animated Pillow image, frames as a list of what
#: `load_image` takes or as one uint8 array [frames, H, W, 3] (RGB) or [frames, H, W, 4] (RGBA), or a torch
#: tensor of frames.
VideoSource: TypeAlias = (
    "str | PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray | Tensor | "
    "Sequence[ImageSource]"
)

_PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))


def load_video(source: VideoSource, frames: int, color: str = "rgb") -> list[Image.Image]:
    """Return `frames` upright RGB images of a video; only these are decoded, where the format allows that.

    color  order of the channels of arrays and tensors, as `load_image` takes it

    The pictures of a folder follow one another by name, numbers in it by their value. Raises `UsageError`
    for anything that is not a video or has fewer frames, and `VtpError` for one that cannot be decoded.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, frames, color)
    if is_tensor(source):
        source = frames_of(source)
    if isinstance(source, Image.Image):
        return _from_animation(source, "the picture", frames)
    if isinstance(source, bytes | bytearray | memoryview):
        data = as_bytes(source)
        return _from_open_file(BytesIO(data), f"the video given as {len(data)} bytes", frames)
    if isinstance(source, str | PathLike):
        return _from_path(path_of(source), frames)
    if isinstance(source, list | tuple):
        return [load_image(source[place], color) for place in sample_frames(len(source), frames, "the video")]
    raise _not_a_video(source)


def check_video(source: VideoSource, frames: int) -> None:
    """Raise what `load_video` would, as far as that shows without decoding: of a list every frame that is
    looked at is checked, of a file its kind, and of a folder its pictures."""
    source = frames_of(source) if is_tensor(source) else source
    if isinstance(source, np.ndarray):
        _places_in(source, frames)
    elif isinstance(source, list | tuple):
        for place in sample_frames(len(source), frames, "the video"):
            check_image(source[place])
    elif isinstance(source, str | PathLike):
        path = Path(path_of(source))
        with _errors_of(path):
            if path.is_dir():
                for picture in _sampled_files(path, frames):
                    check_image(picture)
            else:
                with open_regular(path) as file:
                    header = file.read(32)
                    file.seek(0)
                    if not is_video(header):
                        identify(file, f"'{path}'")
    elif not isinstance(source, Image.Image | bytes | bytearray | memoryview):
        raise _not_a_video(source)


def sample_frames(total: int, frames: int, name: str = "the video") -> list[int]:
    """Which `frames` of `total` frames are looked at; `UsageError` if there are fewer."""
    if total < frames:
        raise UsageError(
            f"{name} has {total} frame{'s' * (total != 1)}, and this bundle answers about clips of {frames}; "
            f"give a longer one, or export with --frames {max(total, 1)}"
        )
    return [place * total // frames for place in range(frames)]


def _from_array(array: np.ndarray, frames: int, color: str) -> list[Image.Image]:
    return [load_image(array[place], color) for place in _places_in(array, frames)]


def _places_in(array: np.ndarray, frames: int) -> list[int]:
    """Which frames of an array are looked at; UsageError for one that is not a video."""
    array = plain_array(array)
    if array.ndim in (2, 3):
        raise _a_picture("the array", frames)
    if array.ndim != 4 or array.shape[3] not in (3, 4) or array.dtype != np.uint8:
        raise UsageError(
            f"a video array must be uint8 [frames, height, width, 3] in RGB, or 4 in RGBA, not {array.dtype} "
            f"{list(array.shape)}"
        )
    return sample_frames(len(array), frames)


def _from_path(text: str, frames: int) -> list[Image.Image]:
    """A folder of pictures, an animated picture or a video file."""
    path = Path(text)
    with _errors_of(path):
        if path.is_dir():
            return [load_image(file) for file in _sampled_files(path, frames)]
        with open_regular(path) as file:
            header = file.read(32)
            file.seek(0)
            if is_video(header):
                return _with_opencv(path, frames)
            return _from_open_file(file, f"'{path}'", frames)
    raise AssertionError  # for mypy: errors are never swallowed


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Say what the system says of a path as `UsageError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise UsageError(
            f"no such folder or file: '{path}'; give a folder of frames, or a video's file"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read '{path}': {reason(error)}") from error


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names, numbers in these by their value.

    Raises UsageError for a folder without any, and OSError for one that cannot be read.
    """
    files = [file for file in folder.iterdir() if file.suffix.lower() in _PICTURES and file.name[0] != "."]
    if not files:
        raise UsageError(f"the folder '{folder}' holds no pictures ({', '.join(sorted(_PICTURES))})")
    return sorted(files, key=_by_number)


def _sampled_files(path: Path, frames: int) -> list[Path]:
    """The pictures of a folder that are looked at."""
    files = picture_files(path)
    return [files[place] for place in sample_frames(len(files), frames, f"'{path}'")]


def _by_number(file: Path) -> tuple[list[tuple[int, str]], str]:
    """The name cut into words and numbers, so that frame comes before frame2, and that before frame10."""
    parts = re.split(r"(\d+)", file.stem)
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts], file.suffix


def _from_open_file(file: BinaryIO, name: str, frames: int) -> list[Image.Image]:
    if is_video(file.read(32)):
        raise UsageError(f"{name} is a video file; give its path, or a list of its frames")
    file.seek(0)
    return _from_animation(identify(file, name), name, frames)


def _from_animation(image: Image.Image, name: str, frames: int) -> list[Image.Image]:
    """Frames of a picture that moves; one that does not is refused."""
    try:
        total = getattr(image, "n_frames", 1)
        if total == 1:
            raise _a_picture(name, frames)
        shown = []
        for place in sample_frames(total, frames, name):
            image.seek(place)
            shown.append(load_image(image))
        return shown
    except VtpError:
        raise
    except Exception as error:  # decoders of damaged data raise nearly anything
        raise VtpError(f"{name} is truncated or damaged: {reason(error)}; give another file") from error


def _not_a_video(source: object) -> UsageError:
    return UsageError(
        "a video may be a folder, a file, bytes, an animated PIL image, a list of frames or a uint8 array "
        f"[frames, H, W, 3], not {type(source).__name__}"
    )


def _a_picture(name: str, frames: int) -> UsageError:
    return UsageError(
        f"{name} is a single picture, and this bundle answers about videos: give {frames} frames or more, as "
        "a list, a folder of pictures or an animated GIF or WebP"
    )


def _with_opencv(path: Path, frames: int) -> list[Image.Image]:
    """Read a video file from its start: seeking is not exact in all formats."""
    try:
        import cv2
    except ImportError:
        raise VtpError(
            f"'{path}' is a video file, which only OpenCV reads, and it is not installed: pip install "
            "opencv-python-headless, or give a folder of its frames"
        ) from None
    video: Any = cv2.VideoCapture(str(path))
    try:
        total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        if not video.isOpened() or total < 1:
            raise VtpError(f"OpenCV finds no frames in '{path}'; give a folder of its frames")
        places = sample_frames(total, frames, f"'{path}'")
        shown = [
            load_image(np.ascontiguousarray(frame[:, :, ::-1]))  # it gives BGR
            for frame in _wanted(video, places)
        ]
    finally:
        video.release()
    if len(shown) < frames:
        raise VtpError(f"'{path}' ends before the {total} frames that it names; give a folder of its frames")
    return shown


def _wanted(video: Any, places: list[int]) -> Any:
    """The frames at `places`, ascending, as OpenCV gives them: uint8 [H, W, 3]."""
    for place in range(places[-1] + 1):
        if not video.grab():
            return
        if place in places:
            decoded, frame = video.retrieve()
            if not decoded:
                return
            yield frame
