"""Kind "internvl": InternVL's tiling. The picture's parts, then the whole picture as a last tile.

Source: transformers' image_processing_pil_got_ocr2.py, which InternVL uses. Of the grids of `min_tiles` to
`max_tiles` tiles the processor takes the one whose aspect is nearest to the picture's and stretches the
picture over it. A bundle for one tile is of kind "clip".
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from vtp.runtime.preprocess.fit import fitted_size, pad, padded_box
from vtp.runtime.preprocess.pixels import cut_tiles, resize, values_of
from vtp.runtime.preprocess.spec import Box, ImageSpec, Size

FIELDS = ("image_height", "image_width", "fit", "height", "width", "min_tiles", "max_tiles")


def check(spec: ImageSpec) -> None:
    """An image size of whole tiles, as many as the processor may cut."""
    spec.require_all("image_height", "image_width", "height", "width", "min_tiles", "max_tiles")
    (height, width), (tall, wide) = spec.image_size, spec.tile
    spec.require(
        height % tall == 0 and width % wide == 0,
        f"image size {width}x{height} is not made of whole tiles; give multiples of {wide}x{tall}",
    )
    least, most = spec.min_tiles or 1, spec.max_tiles or 1
    spec.require(
        max(2, least) <= math.prod(tiles(spec)) <= most,
        f"image size {width}x{height} is {math.prod(tiles(spec))} tiles; this processor cuts "
        f"{max(2, least)} to {most}",
    )


def size(spec: ImageSpec) -> Size:
    """(H, W) of one tile."""
    return spec.tile


def tiles(spec: ImageSpec) -> tuple[int, int]:
    """(rows, columns) of the tiles before the whole picture."""
    return spec.image_size[0] // spec.tile[0], spec.image_size[1] // spec.tile[1]


def shape(spec: ImageSpec) -> tuple[int, ...]:
    """[rows x columns + 1, 3, H, W]; the whole picture comes last."""
    return (math.prod(tiles(spec)) + 1, 3, *spec.tile)


def default_size(tile: Size, min_tiles: int, max_tiles: int) -> Size:
    """The size of a bundle for which none was asked: two by two tiles, or what is allowed near that."""
    count = min(max(4, min_tiles), max_tiles)
    _, columns, rows = min((abs(x - y), x, y) for x, y in _grids(count, count))
    return rows * tile[0], columns * tile[1]


def pixels(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Fit, then the parts and the whole picture: float32 [rows x columns + 1, 3, H, W]."""
    image = pad(image, _fitted(spec, (image.height, image.width)), spec)
    parts = values_of(resize(image, spec.image_size, spec), spec)
    whole = values_of(resize(image, spec.tile, spec), spec)
    return np.concatenate([cut_tiles(parts, spec.tile), whole[None]])


def boxes(spec: ImageSpec, width: int, height: int) -> tuple[Box, ...]:
    """The parts, then the whole picture."""
    whole = padded_box((height, width), _fitted(spec, (height, width)))
    return (*whole.cut(*tiles(spec)), whole)


def _fitted(spec: ImageSpec, picture: Size) -> Size:
    own = _best_grid(picture, spec.tile, spec.min_tiles or 1, spec.max_tiles or 1)
    return fitted_size(spec, picture, own, tiles(spec))


def _best_grid(picture: Size, tile: Size, least: int, most: int) -> tuple[int, int]:
    """transformers' choice as (rows, columns); of equal aspects the larger, while the picture fills half."""
    height, width = picture
    best, nearest = (1, 1), math.inf
    for columns, rows in _grids(least, most):
        gap = abs(width / height - columns / rows)
        fills = width * height > 0.5 * tile[0] * tile[1] * columns * rows
        if gap < nearest or (gap == nearest and fills):
            best, nearest = (rows, columns), gap
    return best


def _grids(least: int, most: int) -> list[tuple[int, int]]:
    """Every (columns, rows) of `least` to `most` tiles, the fewest tiles first."""
    sides = range(1, most + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most]
    return sorted(grids, key=math.prod)
