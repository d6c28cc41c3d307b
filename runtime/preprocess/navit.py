"""Kinds "navit" and "navit_slices": MiniCPM-V. Patches, row by row, of one view or of the whole and slices.

Source: transformers' image_processing_pil_minicpmv4_6.py. A picture in one piece is resized to about the same
number of pixels, whatever its own, with edges of whole visual tokens. A picture of more pixels than that is
shown so as well, and behind that in a grid of slices of about as many pixels each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from vtp.runtime.preprocess.base import ImageSpec, Size, is_int
from vtp.runtime.preprocess.fit import Layout, OneViewSpec, UnlikeTilesSpec
from vtp.runtime.preprocess.pixels import resize, values_of

MERGE = 4  # patches along an edge of a visual token, merged in two steps
MOST_SLICES = 64  # of a picture


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
        _require_square(self, self.max_pixels)
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

    @property
    def view_grids(self) -> tuple[tuple[int, int], ...]:
        return ((self.image_height // self.patch_size, self.image_width // self.patch_size),)

    @property
    def view_tokens(self) -> tuple[int, ...]:
        return (math.prod(self.image_size) // (self.patch_size * self.merge_size) ** 2,)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Fit, resize, patchify: float32 [patches, 3 x patch x patch]."""
        return _patches(self.padded(image), self.image_size, (1, 1), self, self.patch_size)

    def own_size(self, picture: Size) -> Size:
        return own_size(picture, math.isqrt(self.max_pixels), self.patch_size * self.merge_size)


@dataclass(frozen=True, kw_only=True)
class NavitSlicesSpec(UnlikeTilesSpec):
    """[patches, 3 x patch x patch] of the whole picture, then of up to `max_tiles` slices.

    `max_pixels` is a square number: the pixels that the processor gives the whole, and a slice, before it
    rounds.
    """

    kind: ClassVar[str] = "navit_slices"
    whole_first: ClassVar[bool] = True

    max_pixels: int
    max_tiles: int

    def check(self) -> None:
        """At least two slices."""
        self.require_lengths("max_tiles", "patch_size", "merge_size")
        _require_square(self, self.max_pixels)
        self.require(
            2 <= self.max_tiles <= MOST_SLICES,
            f"{self.max_tiles} slices do not fit; the most must be 2 to {MOST_SLICES}",
        )
        super().check()

    def layout_of(self, picture: Size) -> Layout | None:
        edge, factor = math.isqrt(self.max_pixels), self.patch_size * self.merge_size
        grid = slice_grid(picture, self.max_pixels, self.max_tiles)
        if grid is None:
            return None
        height, width = picture
        part = _to_multiple(height, grid[0]) / grid[0], _to_multiple(width, grid[1]) / grid[1]
        return Layout(grid, own_size(part, edge, factor), own_size(picture, edge, factor))

    def patches(self, image: Image.Image, size: Size, grid: tuple[int, int]) -> np.ndarray:
        return _patches(image, size, grid, self, self.patch_size)


def slice_grid(picture: Size, pixels: int, most: int) -> tuple[int, int] | None:
    """transformers' (rows, columns) of slices of about `pixels` each, at most `most`; None: it cuts none.

    Of as many slices as there are `pixels` in the picture, one more or one fewer, it takes the grid whose
    aspect is nearest to the picture's, and of equally near ones the one with more rows.
    """
    height, width = picture
    aspect, count = math.log(width / height), min(math.ceil(width * height / pixels), most)
    if count <= 1:
        return None
    best, nearest = (1, 1), math.inf
    for number in (count - 1, count, count + 1):
        for rows in range(1, number + 1) if 1 < number <= most else ():
            if number % rows:
                continue
            columns = number // rows
            gap = abs(aspect - math.log(columns / rows))
            if gap < nearest or (gap == nearest and rows > best[0]):
                best, nearest = (rows, columns), gap
    return best


def _to_multiple(length: int, parts: int) -> int:
    """The multiple of `parts` that is nearest to `length`, and no less than one of it."""
    return max(round(length / parts) * parts, parts)


def _require_square(spec: ImageSpec, pixels: int) -> None:
    """Raise `VtpError` for a `max_pixels` that is no edge squared."""
    fits = is_int(pixels) and pixels >= 1 and math.isqrt(pixels) ** 2 == pixels
    spec.require(fits, f"max_pixels must be a positive square number, not {pixels!r}")


def _patches(
    image: Image.Image, size: Size, grid: tuple[int, int], spec: ImageSpec, patch: int
) -> np.ndarray:
    """A picture resized to `size`, normalised, cut into a grid of slices, and these into patches row by row:
    float32 [patches, 3 x patch x patch]."""
    values, (rows, columns), (height, width) = values_of(resize(image, size, spec), spec), grid, size
    parts = values.reshape(3, rows, height // rows // patch, patch, columns, width // columns // patch, patch)
    return np.ascontiguousarray(parts.transpose(1, 4, 2, 5, 0, 3, 6)).reshape(-1, 3 * patch * patch)


def own_size(picture: tuple[float, float], edge: int, factor: int) -> Size:
    """transformers' rule: about `edge` squared pixels of the picture's aspect, in multiples of `factor`."""
    aspect = picture[1] / picture[0]
    height = int(edge / math.sqrt(aspect))
    width = int(height * aspect)
    return max(round(height / factor) * factor, factor), max(round(width / factor) * factor, factor)
