"""Kind "navit": MiniCPM-V without slices. One view at a fixed size, handed over as patches, row by row.

Source: transformers' image_processing_pil_minicpmv4_6.py with slice_mode false. Every picture is resized to
about the same number of pixels, whatever its own, with edges of whole visual tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from vtp.runtime.preprocess.base import Size, is_int
from vtp.runtime.preprocess.fit import OneViewSpec
from vtp.runtime.preprocess.pixels import resize, values_of

MERGE = 4  # patches along an edge of a visual token, merged in two steps


@dataclass(frozen=True, kw_only=True)
class NavitSpec(OneViewSpec):
    """[patches, 3 x patch x patch]: `patch_size` cuts the picture, `merge_size` patches an edge make a token.

    `max_pixels` is a square number: the pixels that the processor gives a picture, before it rounds.
    """

    kind: ClassVar[str] = "navit"

    max_pixels: int
    patch_size: int
    merge_size: int

    def check(self) -> None:
        """An image size that the processor gives to pictures of its shape."""
        super().check()
        self.require_lengths("patch_size", "merge_size")
        most = self.max_pixels
        fits = is_int(most) and most >= 1 and math.isqrt(most) ** 2 == most
        self.require(fits, f"max_pixels must be a positive square number, not {most!r}")
        height, width = self.image_size
        tall, wide = self.own_size(self.image_size)
        self.require(
            (tall, wide) == (height, width),
            f"image size {width}x{height} is not one that this processor gives a picture of that shape; give "
            f"{wide}x{tall}",
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """[patches, 3 x patch x patch]."""
        rows, columns = (edge // self.patch_size for edge in self.image_size)
        return rows * columns, 3 * self.patch_size * self.patch_size

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Fit, resize, patchify: float32 [patches, 3 x patch x patch]."""
        image = resize(self.padded(image), self.image_size, self)
        patch, (height, width) = self.patch_size, self.image_size
        parts = values_of(image, self).reshape(3, height // patch, patch, width // patch, patch)
        return np.ascontiguousarray(parts.transpose(1, 3, 0, 2, 4)).reshape(self.shape)

    def own_size(self, picture: Size) -> Size:
        return own_size(picture, math.isqrt(self.max_pixels), self.patch_size * self.merge_size)


def own_size(picture: Size, edge: int, factor: int) -> Size:
    """transformers' rule: about `edge` squared pixels of the picture's aspect, in multiples of `factor`."""
    aspect = picture[1] / picture[0]
    height = int(edge / math.sqrt(aspect))
    width = int(height * aspect)
    return max(round(height / factor) * factor, factor), max(round(width / factor) * factor, factor)
