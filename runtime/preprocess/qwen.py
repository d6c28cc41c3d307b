"""Kind "qwen": Qwen2-VL, Qwen2.5-VL and Qwen3-VL. One view at a fixed size, handed over as patches.

Source: transformers' image_processing_pil_qwen2_vl.py. The picture is resized to multiples of
patch x merge, and each row of `pixel_values` is one patch (repeated for `temporal_patch_size` frames), in
the order in which the model merges patches: merge x merge neighbours follow one another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from vtp.engines.errors import VtpError
from vtp.runtime.preprocess.base import Size
from vtp.runtime.preprocess.fit import OneViewSpec
from vtp.runtime.preprocess.pixels import resize, values_of

_MOST_UNEVEN = 200  # most that the longest edge may be, in shortest edges


@dataclass(frozen=True, kw_only=True)
class QwenSpec(OneViewSpec):
    """[patches, values]: `patch_size`, `temporal_patch_size`, `merge_size` cut the picture.

    The processor's own range of sizes is `min_pixels` to `max_pixels`.
    """

    kind: ClassVar[str] = "qwen"

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int

    def check(self) -> None:
        """An image size that the processor could give to some picture."""
        super().check()
        self.require_lengths("patch_size", "temporal_patch_size", "merge_size")
        self.require_multiples(self._factor, "merged patches")
        self.require_pixels(self.min_pixels, self.max_pixels)

    @property
    def shape(self) -> tuple[int, ...]:
        """[patches, 3 x temporal x patch x patch]."""
        rows, columns = self._grid
        return rows * columns, 3 * self.temporal_patch_size * self.patch_size * self.patch_size

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Fit, resize, patchify: float32 [patches, 3 x temporal x patch x patch]."""
        image = resize(self.padded(image), self.image_size, self)
        patch, merge, times = self.patch_size, self.merge_size, self.temporal_patch_size
        rows, columns = self._grid
        parts = values_of(image, self).reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
        parts = parts.transpose(1, 4, 2, 5, 0, 3, 6)  # [rows, columns, merge, merge, 3, patch, patch]
        frames = np.broadcast_to(parts[:, :, :, :, :, None], (*parts.shape[:5], times, patch, patch))
        return np.ascontiguousarray(frames).reshape(self.shape)

    @property
    def _grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.image_height // self.patch_size, self.image_width // self.patch_size

    @property
    def _factor(self) -> int:
        return self.patch_size * self.merge_size

    def own_size(self, picture: Size) -> Size:
        long, short = max(picture), min(picture)
        if long > _MOST_UNEVEN * short:
            raise VtpError(
                f"a picture of {picture[1]}x{picture[0]} is too long: one edge may be at most "
                f"{_MOST_UNEVEN} times the other for this model; crop it first"
            )
        return _smart_resize(picture, self._factor, self.min_pixels, self.max_pixels)


def default_size(min_pixels: int, max_pixels: int, factor: int) -> Size:
    """The size of a bundle for which none was asked: 448 x 448, within what the processor takes."""
    return _smart_resize((448, 448), factor, min_pixels, max_pixels)


def _smart_resize(picture: Size, factor: int, least: int, most: int) -> Size:
    """transformers' rule: multiples of `factor` close to the picture's own size, `least` to `most` pixels."""
    height, width = picture
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor * factor > most:
        shrink = math.sqrt((height * width) / most)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor * factor < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor
