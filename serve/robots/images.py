"""Pictures of ROS messages as RGB: sensor_msgs/Image by its encoding, CompressedImage by its bytes.

Knows the fields of those messages and not ROS, so that recorded messages are read alike. Encodings and their
names are those of ROS' `sensor_msgs/image_encodings.hpp`; what is made of them equals what cv_bridge
(OpenCV) makes of them, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vtp.engines.errors import VtpError, quoted, shown
from vtp.runtime.media.images import EncodedImage, excess, load_image

__all__ = ["ENCODINGS", "compressed_rgb", "image_rgb", "picture_of"]


class _Packed(NamedTuple):
    """Pixels of whole bytes: how many, and which of them are red, green and blue. Alpha is left out."""

    width: int
    rgb: tuple[int, int, int]


class _Shared(NamedTuple):
    """Two pixels in four bytes that share their colour (4:2:2): where luma and the two chroma values lie."""

    luma: int
    u: int
    v: int


_PACKED = {
    "rgb8": _Packed(3, (0, 1, 2)),
    "bgr8": _Packed(3, (2, 1, 0)),
    "rgba8": _Packed(4, (0, 1, 2)),
    "bgra8": _Packed(4, (2, 1, 0)),
    "mono8": _Packed(1, (0, 0, 0)),
    "8UC1": _Packed(1, (0, 0, 0)),
}
_YUYV, _UYVY = _Shared(0, 1, 3), _Shared(1, 0, 2)
# The names up to ROS 2 Humble and those since then; "yuv422" alone has always meant UYVY.
_SHARED = {"yuyv": _YUYV, "yuv422_yuy2": _YUYV, "uyvy": _UYVY, "yuv422": _UYVY}

#: Encodings of sensor_msgs/Image that are served.
ENCODINGS = (*_PACKED, *_SHARED)

_CURES = {
    "bayer_": "image_proc's debayer node makes rgb8 of it",
    "16UC": "scale depth to mono8 first",
    "32FC": "scale depth to mono8 first",
    "mono16": "scale it to mono8 first",
}
_FORMATS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}

# BT.601 of 8 bits, luma 16 to 235 and chroma 16 to 240, as whole numbers of 2^-20: OpenCV's own.
_BITS = 20
_LUMA, _RED_V, _GREEN_U, _GREEN_V, _BLUE_U = 1220542, 1673527, -409993, -852492, 2116026
_BLOCK = 1 << 18  # pixels that are converted at once: the whole numbers take 16 bytes each


def picture_of(message: Any) -> np.ndarray:
    """uint8 RGB [H,W,3] of a message: of an Image, or of a CompressedImage, which has a `format`.

    Raises VtpError for an encoding or format that is not served, and for fields that contradict.
    """
    if hasattr(message, "format"):
        return compressed_rgb(message.format, message.data)
    return image_rgb(message.encoding, message.height, message.width, message.step, message.data)


def image_rgb(encoding: str, height: int, width: int, step: int, data: Any) -> np.ndarray:
    """uint8 RGB [H,W,3] of a sensor_msgs/Image's fields.

    encoding  one of `ENCODINGS`. Alpha is left out. YUV is BT.601 of limited range (luma 16 to 235), as USB
              cameras send it; two pixels have the chroma that they share
    step      bytes from one row to the next: what lies behind a row's pixels is left out
    data      bytes-like (the message's `data`): `height` rows, the last one with or without what fills it up
    """
    layout = _layout(encoding)
    if height < 1 or width < 1:
        raise VtpError(f"an image of {width}x{height} pixels came: there is nothing to see")
    if too_large := excess(width, height):
        raise VtpError(f"an image came that is {too_large}")
    if isinstance(layout, _Shared):
        if width % 2:
            raise VtpError(f"an image of encoding '{encoding}' is {width} pixels wide; it must be even")
        return _from_yuv(_rows(height, 2 * width, step, data, encoding), layout)
    pixels = _rows(height, layout.width * width, step, data, encoding).reshape(height, width, layout.width)
    return np.ascontiguousarray(pixels[..., layout.rgb])


def compressed_rgb(format_name: str, data: Any) -> np.ndarray:
    """uint8 RGB [H,W,3] of a sensor_msgs/CompressedImage's fields: upright, in the file's own colours.

    The bytes say whether they are JPEG or PNG; `format_name` ("jpeg", "rgb8; jpeg compressed bgr8") is only
    shown where they are neither, as depth and video (h264) are.
    """
    content = bytes(data)
    if not content:
        raise VtpError(f"a compressed image of format {quoted(format_name, 60)} came without data")
    kind = next((kind for start, kind in _FORMATS.items() if content.startswith(start)), None)
    if kind is None:
        raise VtpError(
            f"a compressed image of format {quoted(format_name, 60)} is neither JPEG nor PNG, which are "
            "served; publish one of them, or the raw image"
        )
    return np.asarray(load_image(EncodedImage(content, (kind,))))


def _layout(encoding: str) -> _Packed | _Shared:
    layout = _PACKED.get(encoding) or _SHARED.get(encoding)
    if layout is None:
        cure = next((f"; {cure}" for start, cure in _CURES.items() if encoding.startswith(start)), "")
        raise VtpError(
            f"images of encoding {quoted(encoding, 60)} are not served, only {', '.join(ENCODINGS)}{cure}"
        )
    return layout


def _rows(height: int, used: int, step: int, data: Any, encoding: str) -> np.ndarray:
    """uint8 [H,used]: each row's pixels, without a copy. VtpError for a step or length that cannot be."""
    if step < used:
        raise VtpError(
            f"an image says step {step}, but {used} bytes are one row of its width in {shown(encoding, 60)}"
        )
    values = np.frombuffer(data, np.uint8)
    whole, least = height * step, (height - 1) * step + used
    if values.size not in (whole, least):
        raise VtpError(
            f"an image has {values.size} bytes of data, but {height} rows of step {step} are {whole} bytes"
        )
    return np.lib.stride_tricks.as_strided(values, (height, used), (step, 1), writeable=False)


def _from_yuv(rows: np.ndarray, layout: _Shared) -> np.ndarray:
    """RGB [H,W,3] of 4:2:2 rows [H,2·W], some rows at a time."""
    height, width = rows.shape[0], rows.shape[1] // 2
    made = np.empty((height, width, 3), np.uint8)
    together = max(1, _BLOCK // width)
    for start in range(0, height, together):
        _convert(rows[start : start + together], layout, made[start : start + together])
    return made


def _convert(rows: np.ndarray, layout: _Shared, made: np.ndarray) -> None:
    quads = rows.reshape(rows.shape[0], -1, 4)
    luma = np.maximum(quads[..., layout.luma :: 2].astype(np.int32) - 16, 0) * _LUMA + (1 << (_BITS - 1))
    u, v = (quads[..., place].astype(np.int32) - 128 for place in (layout.u, layout.v))
    for channel, tint in enumerate(_tints(u, v)):
        value = (luma + tint[..., None]) >> _BITS
        made[..., channel] = value.clip(0, 255).reshape(made.shape[:2])


def _tints(u: np.ndarray, v: np.ndarray) -> Sequence[np.ndarray]:
    """What chroma adds to red, green and blue."""
    return _RED_V * v, _GREEN_V * v + _GREEN_U * u, _BLUE_U * u
