"""Kind "naflex": LFM2-VL without tiles. One view at a fixed size, handed over as patches, row by row.

Source: transformers' image_processing_lfm2_vl.py with do_image_splitting false. The picture is resized to
multiples of patch x merge; a row of `pixel_values` is one patch, pixel by pixel with its three channels. That
processor exists with torchvision alone, so resizing is torch's (see `fixed_point`) and so is the arithmetic:
mean and deviation are multiplied by 255, and pixels are left as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from vtp.runtime.media import fixed_point
from vtp.runtime.preprocess.base import Box, Size, is_int
from vtp.runtime.preprocess.fit import FittedSpec, pad, padded_box

BILINEAR = 2


@dataclass(frozen=True, kw_only=True)
class NaflexSpec(FittedSpec):
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
        least, most = self.min_pixels, self.max_pixels
        for name, count in (("min_pixels", least), ("max_pixels", most)):
            self.require(is_int(count) and count >= 1, f"{name} must be positive, not {count!r}")
        self.require(self.resample == BILINEAR, f"resample must be {BILINEAR}, not {self.resample}")
        self.require(self.do_rescale and self.do_normalize, "kind naflex needs do_rescale and do_normalize")
        height, width = self.image_size
        self.require(
            height % self._factor == 0 and width % self._factor == 0,
            f"image size {width}x{height} is not made of whole visual tokens; give multiples of "
            f"{self._factor}",
        )
        self.require(
            least <= height * width <= most,
            f"image size {width}x{height} has {height * width} pixels; this processor takes {least} to "
            f"{most}",
        )

    @property
    def fixed_size(self) -> Size:
        """(H, W) of the resized picture."""
        return self.image_size

    @property
    def shape(self) -> tuple[int, ...]:
        """[patches, patch x patch x 3]."""
        rows, columns = (edge // self.patch_size for edge in self.image_size)
        return rows * columns, 3 * self.patch_size * self.patch_size

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Fit, resize, normalise, patchify: float32 [patches, patch x patch x 3]."""
        image = pad(image, self._fitted((image.height, image.width)), self)
        pixels = fixed_point.resize(np.asarray(image), self.image_size)
        values = self._normalised(pixels)
        patch, (height, width) = self.patch_size, self.image_size
        parts = values.reshape(height // patch, patch, width // patch, patch, 3).transpose(0, 2, 1, 3, 4)
        return np.ascontiguousarray(parts).reshape(self.shape)

    def boxes(self, width: int, height: int) -> tuple[Box, ...]:
        """The whole picture with its padding."""
        return (padded_box((height, width), self._fitted((height, width))),)

    def _normalised(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [.,3] -> float32; torch rounds mean and deviation to float32 before it multiplies them."""
        whole = np.float32(1.0 / self.rescale_factor)
        mean, std = (np.array(numbers, np.float32) * whole for numbers in (self.mean, self.std))
        return (pixels.astype(np.float32) - mean) / std

    @property
    def _factor(self) -> int:
        return self.patch_size * self.merge_size

    def _fitted(self, picture: Size) -> Size:
        own = _own_size(picture, self._factor, self.min_pixels, self.max_pixels)
        return self.fitted_size(picture, own, self.image_size)


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
