"""Opening a picture: whatever the caller holds becomes one upright RGB `PIL.Image`.

Pixels equal those that transformers' image processors make of the opened picture, so that preprocessing can
be bit-exact; docs/pictures.md says where they depart. Knows nothing about models.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import BinaryIO, TypeAlias, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from vtp.engines.disk.files import open_checked
from vtp.engines.errors import UsageError, VtpError, shown
from vtp.runtime.media.rgb import to_rgb
from vtp.runtime.media.tensors import Tensor, extent_of, is_tensor, pixels_of

__all__ = [
    "COLORS",
    "MAX_PIXELS",
    "MAX_SIDE",
    "EncodedImage",
    "ImageSource",
    "as_bytes",
    "check_image",
    "excess",
    "identify",
    "is_video",
    "load_image",
    "open_regular",
    "path_of",
    "plain_array",
    "reason",
]

#: Largest picture that is decoded, in pixels (about 9459 x 9459). It is checked from the header, before any
#: pixel is read, whatever Pillow's own limit and the process's warning filters say.
MAX_PIXELS = 89_478_485

#: Longest side of a picture that is decoded, in pixels, checked as `MAX_PIXELS` is: twice what cameras make
#: (panoramas of telephones, 16,384). Each row of a picture takes memory and time of its own, however short.
MAX_SIDE = 32_768


@dataclass(frozen=True)
class EncodedImage:
    """A picture file's bytes, of some formats only, by Pillow's names; decoded when it is loaded."""

    data: bytes
    formats: tuple[str, ...]


#: What `load_image` takes: a path, a file's bytes, a Pillow image, a uint8 array [H, W, 3] (RGB), [H, W, 4]
#: (RGBA) or [H, W], or a torch tensor (see `tensors`).
ImageSource: TypeAlias = (
    "str | PathLike[str] | bytes | bytearray | memoryview | EncodedImage | Image.Image | np.ndarray | Tensor"
)
COLORS = ("rgb", "bgr")  # orders of channels in arrays and tensors; BGR is OpenCV's

T = TypeVar("T")

# Without a handler Python prints what Pillow logs about damaged files; what is wrong is raised here anyway.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# Opening these starts an outside program (Ghostscript) on the file, which nobody asked for.
_VECTOR_FORMATS = frozenset({"EPS"})


def load_image(source: ImageSource, color: str = "rgb") -> Image.Image:
    """Return `source` as a new, upright RGB image, transparent parts on white; of an animation, the first
    frame.

    color  order of an array's or a tensor's channels, "rgb" (RGBA) or "bgr" (BGRA); files and Pillow images
           say theirs themselves

    A URL is not fetched. Raises `UsageError` for a source of the wrong kind, shape or dtype or a file that is
    not there, and `VtpError` for a picture that cannot be decoded, is too large, or has pixels of unknown
    range.
    """
    return _with_image(source, _to_rgb, color)


def check_image(source: ImageSource) -> None:
    """Raise what `load_image` would, as far as that shows without decoding: kind, file, header and size."""
    if isinstance(source, np.ndarray):
        _checked(source)  # and not copied
    elif is_tensor(source):
        _check_extent(source.shape, *extent_of(source))
    else:
        _with_image(source, _check_size)


def _with_image(source: ImageSource, act: Callable[[Image.Image, str], T], color: str = "rgb") -> T:
    """What `act` makes of the picture, opened and not yet decoded, and of its name in messages."""
    if isinstance(source, Image.Image):
        return act(source, "the picture")
    if isinstance(source, np.ndarray):
        return act(_from_array(source, color), "the image array")
    if is_tensor(source):
        _check_extent(source.shape, *extent_of(source))
        return act(_from_array(pixels_of(source), color), "the image tensor")
    if isinstance(source, EncodedImage):
        return act(identify(BytesIO(source.data), "the picture", source.formats), "the picture")
    if isinstance(source, bytes | bytearray | memoryview):
        data = as_bytes(source)
        name = f"the picture given as {len(data)} bytes"
        return act(identify(BytesIO(data), name), name)
    if isinstance(source, str | PathLike):
        return _from_path(path_of(source), act)
    raise UsageError(
        f"a picture may be a path, bytes, a PIL image, a uint8 array [H, W, 3] or a torch tensor, not "
        f"{type(source).__name__}"
    )


def as_bytes(source: bytes | bytearray | memoryview) -> bytes:
    """The content of a file that is given as bytes."""
    try:
        return bytes(source)
    except ValueError as error:  # a memoryview that was released
        raise UsageError(f"the picture's bytes cannot be read: {reason(error)}") from error


def path_of(source: str | PathLike[str]) -> str:
    """The path as text."""
    text = fspath(source)
    if isinstance(text, bytes):
        raise UsageError("a path must be text, not bytes; bytes are taken for a file's content")
    return text


def _from_path(text: str, act: Callable[[Image.Image, str], T]) -> T:
    """Open a local file, naming what is wrong with the path before Pillow sees it."""
    if text.startswith(("http://", "https://", "data:")):
        raise UsageError(
            f"'{shown(text, 60)}' is not a local file; download the picture first and give its path"
        )
    path = Path(text)
    name = f"'{shown(path)}'"
    try:
        with open_regular(path) as file:
            return act(identify(file, name), name)
    except FileNotFoundError as error:
        raise UsageError(f"no such file: {name}; give the path of a picture") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {name}: {reason(error)}") from error


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; `UsageError` for a directory, and for a FIFO, device or socket.

    Those are told apart before opening, which would wait for a FIFO's writer or disturb a device, and once
    more after it, should another have taken the file's place in between.
    """
    return open_checked(path, partial(_check_regular, path))


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise UsageError(f"'{shown(path)}' is a directory; give one picture file")
    if not stat.S_ISREG(mode):
        raise UsageError(f"'{shown(path)}' is not a regular file; give one picture file")


def identify(file: BinaryIO, name: str, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Open a picture by its header, and decode nothing yet. `VtpError` for what must not be decoded.

    formats  those that may be tried, by Pillow's names; None: all
    """
    header = file.read(32)
    file.seek(0)
    if not header:
        raise VtpError(f"{name} is empty; give a picture such as PNG or JPEG")
    try:
        image = Image.open(file, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise VtpError(f"{name} has too many pixels ({error}); at most {MAX_PIXELS:,} are decoded") from error
    except UnidentifiedImageError as error:
        raise VtpError(_not_an_image(name, header)) from error
    except Exception as error:  # a damaged header makes Pillow's plugins raise nearly anything
        raise VtpError(f"{name} is damaged: {reason(error)}; give another file") from error
    if image.format == "TIFF":
        _silence_libtiff()
    if image.format in _VECTOR_FORMATS:
        raise VtpError(f"{name} is {image.format}, a vector format; save it as PNG or JPEG first")
    return image


@cache
def _silence_libtiff() -> None:
    """Keep libtiff from writing what it thinks of a damaged file to the process's stderr.

    Pillow has no switch for it. Where its libtiff is linked in and not found, the lines stay.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(Image.core.__file__)
        for handler in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            handler(None)


def _not_an_image(name: str, header: bytes) -> str:
    """One line for bytes that no decoder takes; a PNG of no pixels, refused by Pillow too, is told apart."""
    size = header[16:24]
    if header.startswith(b"\x89PNG\r\n\x1a\n") and len(size) == 8 and b"\0\0\0\0" in (size[:4], size[4:]):
        width, height = int.from_bytes(size[:4], "big"), int.from_bytes(size[4:], "big")
        return f"{name} is {width}x{height} pixels: there is nothing to see; give another file"
    if is_video(header):
        return (
            f"{name} is a video, and pictures are served; give one of its frames as PNG, JPEG or WebP "
            "(videos are for bundles made with vtp-export --frames)"
        )
    return (
        f"{name} is not a picture that can be read (unknown format or damaged header); give PNG, JPEG or WebP"
    )


def is_video(header: bytes) -> bool:
    """Whether a file that starts so is MP4, MOV or 3GP (by its brand), Matroska, WebM or AVI."""
    brands = (
        b"isom",
        b"iso2",
        b"iso4",
        b"iso5",
        b"iso6",
        b"mp41",
        b"mp42",
        b"avc1",
        b"M4V ",
        b"qt  ",
        b"3gp",
    )
    if header[4:8] == b"ftyp":
        return header[8:12].startswith(brands)
    return header.startswith(b"\x1a\x45\xdf\xa3") or (header[:4] == b"RIFF" and header[8:12] == b"AVI ")


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise VtpError(f"{name} is {width}x{height} pixels: there is nothing to see; give another one")
    if too_large := excess(width, height):
        raise VtpError(f"{name} is {too_large}: shrink or crop it first")


def excess(width: int, height: int, most_pixels: int = MAX_PIXELS, most_side: int = MAX_SIDE) -> str | None:
    """Which limit a picture's size exceeds, in words: "3x2 = 6 pixels; at most 5 are taken"; None: none."""
    if width * height > most_pixels:
        return f"{width}x{height} = {width * height:,} pixels; at most {most_pixels:,} are taken"
    if max(width, height) > most_side:
        return f"{width}x{height} pixels; each side may have at most {most_side:,}"
    return None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Check the size, decode, turn upright, convert."""
    _check_size(image, name)
    try:
        image.load()
    except Exception as error:  # decoders of damaged data raise OSError, SyntaxError, struct.error, ...
        raise VtpError(f"{name} is truncated or damaged: {reason(error)}; give another file") from error
    try:
        return to_rgb(image, name)
    except VtpError:
        raise
    except Exception as error:  # unknown mode pairs, broken EXIF
        raise VtpError(f"{name} (mode {image.mode}) cannot be turned into RGB: {reason(error)}") from error


def plain_array(array: np.ndarray) -> np.ndarray:
    """The array without its subclass, which may say anything of its shape; `UsageError` for a masked one."""
    if isinstance(array, np.ma.MaskedArray):
        raise UsageError("an image array must not be masked; fill what its mask hides first")
    return np.asarray(array)


def _from_array(array: np.ndarray, color: str) -> Image.Image:
    array = _checked(array)
    if color == "bgr" and array.ndim == 3:
        array = array[:, :, [2, 1, 0, 3][: array.shape[2]]]
    return Image.fromarray(np.ascontiguousarray(array))


def _checked(array: np.ndarray) -> np.ndarray:
    """A uint8 array, [H, W, 3] (RGB), [H, W, 4] (RGBA) or [H, W]; others are refused, not guessed at."""
    array = plain_array(array)
    shape = list(array.shape)
    if array.dtype != np.uint8:
        raise UsageError(
            f"an image array must be uint8 with values 0 to 255, not {array.dtype}; convert it first"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (3, 4)):
        hint = ": move its channels last" if array.ndim == 3 and shape[0] in (3, 4) else ""
        hint = "; videos are for bundles made with vtp-export --frames" if array.ndim == 4 else hint
        raise UsageError(
            f"an image array must be [height, width, 3] in RGB, [height, width, 4] in RGBA or "
            f"[height, width], not {shape}{hint}"
        )
    _check_extent(array.shape, *array.shape[:2])
    return array


def _check_extent(shape: Sequence[int], height: int, width: int) -> None:
    """Refuse an array or tensor of no pixels, or of too many: with strides of 0 it takes no memory yet."""
    if 0 in shape:
        raise VtpError(f"the image array is {list(shape)}: there is nothing to see; give another one")
    if too_large := excess(width, height):
        raise VtpError(f"the image array is {list(shape)}, {too_large}: shrink or crop it first")


def reason(error: BaseException) -> str:
    """The first line of an error's text, or its name when it has none."""
    text = getattr(error, "strerror", None) or str(error)
    lines = str(text).strip().splitlines()
    return lines[0] if lines else type(error).__name__
