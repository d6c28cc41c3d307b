"""Kind "naflex": LFM2-VL without tiles. One view at a fixed size, handed over as patches, row by row.

Source: transformers' image_processing_lfm2_vl.py with do_image_splitting false. The picture is resized to
multiples of patch x merge; a row of `pixel_values` is one patch, pixel by pixel with its three channels.
That processor exists with torchvision alone, so resizing is torch's (`resize_fixed_point`), and so is the
arithmetic: mean and deviation are multiplied by 255, and pixels are left as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from vtp.runtime.preprocess.base import Size
from vtp.runtime.preprocess.fit import OneViewSpec

BILINEAR = 2
_ROWS = 256  # resized at a time, so that sums of 32 bits stay small beside the picture


@dataclass(frozen=True, kw_only=True)
class NaflexSpec(OneViewSpec):
    """[patches, patch x patch x 3]: `patch_size` cuts the picture, `merge_size` patches an edge make a token.

    The processor's own range of sizes is `min_pixels` to `max_pixels`.
    """

    kind: ClassVar[str] = "naflex"

    min_pixels: int
    max_pixels: int
    patch_size: int
    merge_size: int

    def check(self) -> None:
        """An image size that the processor could give to some picture."""
        super().check()
        self.require_lengths("patch_size", "merge_size")
        self.require(self.resample == BILINEAR, f"resample must be {BILINEAR}, not {self.resample}")
        self.require(self.do_rescale and self.do_normalize, "kind naflex needs do_rescale and do_normalize")
        self.require_multiples(self._factor, "visual tokens")
        self.require_pixels(self.min_pixels, self.max_pixels)

    @property
    def shape(self) -> tuple[int, ...]:
        """[patches, patch x patch x 3]."""
        rows, columns = (edge // self.patch_size for edge in self.image_size)
        return rows * columns, 3 * self.patch_size * self.patch_size

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Fit, resize, normalise, patchify: float32 [patches, patch x patch x 3]."""
        image = self.padded(image)
        pixels = resize_fixed_point(np.asarray(image), self.image_size)
        values = self._normalised(pixels)
        patch, (height, width) = self.patch_size, self.image_size
        parts = values.reshape(height // patch, patch, width // patch, patch, 3).transpose(0, 2, 1, 3, 4)
        return np.ascontiguousarray(parts).reshape(self.shape)

    def _normalised(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [.,3] -> float32; torch rounds mean and deviation to float32 before it multiplies them."""
        whole = np.float32(1.0 / self.rescale_factor)
        mean, std = (np.array(numbers, np.float32) * whole for numbers in (self.mean, self.std))
        return (pixels.astype(np.float32) - mean) / std

    @property
    def _factor(self) -> int:
        return self.patch_size * self.merge_size

    def own_size(self, picture: Size) -> Size:
        return _own_size(picture, self._factor, self.min_pixels, self.max_pixels)


def default_size(min_pixels: int, max_pixels: int, factor: int) -> Size:
    """The size of a bundle for which none was asked: the largest square that the processor gives."""
    side = math.isqrt(max_pixels) // factor * factor
    return _own_size((max(side, factor),) * 2, factor, min_pixels, max_pixels)


def _own_size(picture: Size, factor: int, least: int, most: int) -> Size:
    """transformers' rule: multiples of `factor` close to the picture's own size, `least` to `most` pixels."""
    height, width = picture
    rows, columns = max(1, round(height / factor)), max(1, round(width / factor))
    if rows * columns * factor * factor > most:
        shrink = math.sqrt(height * width / most)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor * factor < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def resize_fixed_point(pixels: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [H,W,3] -> uint8 [h,w,3] of `size`, along the width first; an edge that fits is left alone.

    Bilinear with antialiasing as torch does it to uint8: 16-bit weights, rounded between the two passes.
    Source: `upsample_bilinear2d_aa` of PyTorch's UpSampleKernelAVXAntialias.h, which torchvision's `resize`
    uses on processors with AVX2. Pillow's own is the same with finer weights; a pixel may differ by one.
    """
    for axis in (1, 0):
        if pixels.shape[axis] != size[axis]:
            pixels = _along(pixels, axis, size[axis])
    return pixels


def _along(pixels: np.ndarray, axis: int, length: int) -> np.ndarray:
    first, weights, precision = _weights(pixels.shape[axis], length)
    if axis == 0:
        return _summed(pixels, first, weights, precision)
    strips = range(0, len(pixels), _ROWS)
    turned = [pixels[top : top + _ROWS].transpose(1, 0, 2) for top in strips]
    return np.concatenate([_summed(one, first, weights, precision).transpose(1, 0, 2) for one in turned])


def _summed(pixels: np.ndarray, first: np.ndarray, weights: np.ndarray, precision: int) -> np.ndarray:
    """Rows of the result from rows of pixels [n,W,3]: tap j of row i is row first[i] + j."""
    total = np.full((len(first), *pixels.shape[1:]), 1 << (precision - 1), np.int32)
    for tap in range(weights.shape[1]):
        rows = pixels[np.minimum(first + tap, len(pixels) - 1)]  # past the end, weights are 0
        total += rows * weights[:, tap, None, None]
    return np.clip(total >> precision, 0, 255).astype(np.uint8)


def _weights(source: int, length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Of every place of the result: its first source pixel, int32 weights [length,taps], their bits."""
    scale = source / length
    support, step = max(scale, 1.0), 1.0 / max(scale, 1.0)
    taps = math.ceil(support) * 2 + 1
    first, rows = np.zeros(length, np.int64), np.zeros((length, taps))
    for place in range(length):
        centre = scale * (place + 0.5)
        low = max(int(centre - support + 0.5), 0)
        count = min(max(min(int(centre + support + 0.5), source) - low, 0), taps)
        row = [max(0.0, 1.0 - abs((tap + low - centre + 0.5) * step)) for tap in range(count)]
        first[place] = low
        rows[place, :count] = np.array(row) / sum(row)
    largest = rows.max()
    precision = next(
        bits for bits in range(23) if bits == 22 or int(0.5 + largest * (1 << (bits + 1))) >= 1 << 15
    )
    return first, np.floor(0.5 + rows * (1 << precision)).astype(np.int32), precision
