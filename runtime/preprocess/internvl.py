"""Kind "internvl": InternVL's tiling. The picture's parts, then the whole picture as a last tile.

Source: transformers' image_processing_pil_got_ocr2.py, which InternVL uses. Of the grids of `min_tiles` to
`max_tiles` tiles the processor takes the one whose aspect is nearest to the picture's and stretches the
picture over it. A bundle for one tile is of kind "clip".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from vtp.runtime.preprocess.base import Box, Size
from vtp.runtime.preprocess.fit import TiledSpec, pad, padded_box
from vtp.runtime.preprocess.pixels import cut_tiles, resize, values_of

MOST_TILES = 256  # of a picture, whose grids are gone through for every picture; models are made with 12


@dataclass(frozen=True, kw_only=True)
class InternvlSpec(TiledSpec):
    """[tiles, 3, `height`, `width`]: `min_tiles` to `max_tiles` parts, then the whole picture."""

    kind: ClassVar[str] = "internvl"

    min_tiles: int
    max_tiles: int

    def check(self) -> None:
        """An image size of whole tiles, as many as the processor may cut."""
        super().check()
        self.require_lengths("min_tiles", "max_tiles")
        self.require(self.max_tiles <= MOST_TILES, f"max_tiles {self.max_tiles} is more than {MOST_TILES}")
        (height, width), (tall, wide) = self.image_size, self.tile
        self.require(
            height % tall == 0 and width % wide == 0,
            f"image size {width}x{height} is not made of whole tiles; give multiples of {wide}x{tall}",
        )
        count, least = math.prod(self.tiles), max(2, self.min_tiles)
        self.require(
            least <= count <= self.max_tiles,
            f"image size {width}x{height} is {count} tiles; this processor cuts {least} to {self.max_tiles}",
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows x columns + 1, 3, H, W]; the whole picture comes last."""
        return (math.prod(self.tiles) + 1, 3, *self.tile)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Fit, then the parts and the whole picture: float32 [rows x columns + 1, 3, H, W]."""
        image = pad(image, self._fitted((image.height, image.width)), self)
        parts = values_of(resize(image, self.image_size, self), self)
        whole = values_of(resize(image, self.tile, self), self)
        return np.concatenate([cut_tiles(parts, self.tile), whole[None]])

    def boxes(self, width: int, height: int) -> tuple[Box, ...]:
        """The parts, then the whole picture."""
        whole = padded_box((height, width), self._fitted((height, width)))
        return (*whole.cut(*self.tiles), whole)

    def _fitted(self, picture: Size) -> Size:
        own = best_grid(picture, self.tile, grids_of(self.min_tiles, self.max_tiles))
        return self.fitted_size(picture, own, self.tiles)


def default_size(tile: Size, min_tiles: int, max_tiles: int) -> Size:
    """The size of a bundle for which none was asked: two by two tiles, or what is allowed near that."""
    count = min(max(4, min_tiles), max_tiles)
    _, columns, rows = min((abs(x - y), x, y) for x, y in grids_of(count, count))
    return rows * tile[0], columns * tile[1]


def best_grid(picture: Size, tile: Size, grids: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """transformers' choice of (columns, rows) as (rows, columns), the fewest tiles first among `grids`.

    Of equal aspects it is the larger, while the picture fills half.
    """
    height, width = picture
    best, nearest = (1, 1), math.inf
    for columns, rows in grids:
        gap = abs(width / height - columns / rows)
        fills = width * height > 0.5 * tile[0] * tile[1] * columns * rows
        if gap < nearest or (gap == nearest and fills):
            best, nearest = (rows, columns), gap
    return best


def grids_of(least: int, most: int) -> list[tuple[int, int]]:
    """Every (columns, rows) of `least` to `most` tiles, the fewest tiles first."""
    grids = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(math.ceil(least / columns), most // columns + 1)
    ]
    return sorted(grids, key=math.prod)
