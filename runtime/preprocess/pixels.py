"""What every kind shares: the table of pixel values, Pillow's resizing, padding, cutting into tiles."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image

from vtp.engines.errors import VtpError
from vtp.runtime.media.images import MAX_PIXELS
from vtp.runtime.preprocess.base import ImageSpec, Size

_ROWS = 16  # looked up at a time: numpy widens the pixels to indices, and a picture of those is fresh memory


def values_of(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Rescale and normalise an RGB image: float32 [3, H, W]."""
    values, table = np.asarray(image), _value_table(spec)  # [H, W, 3] uint8, [3, 256]
    result = np.empty((3, *values.shape[:2]), np.float32)
    for top in range(0, len(values), _ROWS):
        rows = slice(top, top + _ROWS)
        for channel in range(3):  # "clip", which no value needs, writes into the result without a buffer
            np.take(table[channel], values[rows, :, channel], out=result[channel, rows], mode="clip")
    return result


@lru_cache(maxsize=8)
def _value_table(spec: ImageSpec) -> np.ndarray:
    """What each uint8 value becomes in each channel: float32 [3, 256].

    The order of types is transformers': the product in float64, rounded to float32, then float32 arithmetic.
    """
    values = np.arange(256, dtype=np.uint8)
    scaled = values.astype(np.float64) * spec.rescale_factor if spec.do_rescale else values
    table = np.broadcast_to(scaled.astype(np.float32), (3, 256))
    if not spec.do_normalize:
        return table
    mean, std = (np.array(numbers, dtype=np.float32)[:, None] for numbers in (spec.mean, spec.std))
    return (table - mean) / std


def resize(image: Image.Image, size: Size, spec: ImageSpec) -> Image.Image:
    """Resize to (height, width) with the spec's filter."""
    return image.resize((size[1], size[0]), resample=Image.Resampling(spec.resample))


def paste(image: Image.Image, size: Size, colour: tuple[int, ...]) -> Image.Image:
    """Put the picture in the middle of a (height, width) canvas, an odd pixel of padding behind it."""
    height, width = size
    if (width, height) == image.size:
        return image
    canvas = Image.new("RGB", (width, height), colour)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def mean_colour(spec: ImageSpec) -> tuple[int, ...]:
    """The mean as a colour, rounded down as transformers does: the padding that normalises to almost 0."""
    return tuple(int(value * 255) for value in spec.mean)


def cut_tiles(values: np.ndarray, tile: Size) -> np.ndarray:
    """[3, rows x height, columns x width] -> [rows x columns, 3, height, width], row by row."""
    rows, columns = values.shape[1] // tile[0], values.shape[2] // tile[1]
    parts = values.reshape(3, rows, tile[0], columns, tile[1])
    return np.ascontiguousarray(parts.transpose(1, 3, 0, 2, 4)).reshape(rows * columns, 3, *tile)


def check_area(picture: Size, size: Size, step: str) -> None:
    """Refuse, before any memory is spent, a `picture` that a `step` would make larger than is processed."""
    if math.prod(size) > MAX_PIXELS:
        raise VtpError(
            f"a picture of {picture[1]}x{picture[0]} is too long: {step} it would be {size[1]}x{size[0]}; "
            f"at most {MAX_PIXELS:,} pixels are processed; crop it first"
        )
