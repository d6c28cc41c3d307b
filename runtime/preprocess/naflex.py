"""Kinds "naflex" and "naflex_tiles": LFM2-VL. Patches, row by row, of one view or of tiles and the whole.

Source: transformers' image_processing_lfm2_vl.py. A picture in one piece is resized to multiples of patch x
merge; a row of `pixel_values` is one patch, pixel by pixel with its three channels. A picture of more than so
many pixels is stretched over the grid of tiles whose aspect is nearest to its own, and shown as a whole
behind them, as it would be in one piece. That processor exists with torchvision alone, so resizing is torch's
(`resize_fixed_point`), and so is the arithmetic: mean and deviation are multiplied by 255, and pixels are
left as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from PIL import Image

from vtp.runtime.preprocess.base import ImageSpec, Size, is_int
from vtp.runtime.preprocess.fit import Layout, OneViewSpec, UnlikeTilesSpec
from vtp.runtime.preprocess.internvl import best_grid

BILINEAR = 2
MOST_TILES = 64  # of a picture
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
        _require_steps(self)
        self.require_multiples(self._factor, "visual tokens")
        self.require_pixels(self.min_pixels, self.max_pixels)

    @property
    def shape(self) -> tuple[int, ...]:
        """[patches, patch x patch x 3]."""
        rows, columns = (edge // self.patch_size for edge in self.image_size)
        return rows * columns, 3 * self.patch_size * self.patch_size

    @property
    def view_grids(self) -> tuple[tuple[int, int], ...]:
        return ((self.image_height // self.patch_size, self.image_width // self.patch_size),)

    @property
    def view_tokens(self) -> tuple[int, ...]:
        return (math.prod(self.image_size) // self._factor**2,)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Fit, resize, normalise, patchify: float32 [patches, patch x patch x 3]."""
        return _patches(self.padded(image), self.image_size, (1, 1), self, self.patch_size)

    @property
    def _factor(self) -> int:
        return self.patch_size * self.merge_size

    def own_size(self, picture: Size) -> Size:
        return own_size(picture, self._factor, self.min_pixels, self.max_pixels)


@dataclass(frozen=True, kw_only=True)
class NaflexTilesSpec(UnlikeTilesSpec):
    """[patches, patch x patch x 3] of `min_tiles` to `max_tiles` tiles; with `use_thumbnail`, then the whole.

    height, width         of a tile, which is square
    min_pixels            fewest and `max_pixels` most pixels of a picture in one piece, and of the whole
    max_pixels_tolerance  a picture of more pixels than this times `max_pixels` is cut into tiles
    """

    kind: ClassVar[str] = "naflex_tiles"
    whole_first: ClassVar[bool] = False

    height: int
    width: int
    min_pixels: int
    max_pixels: int
    min_tiles: int
    max_tiles: int
    max_pixels_tolerance: float
    use_thumbnail: bool = True

    def check(self) -> None:
        """Square tiles of whole visual tokens, at least two of them."""
        _require_steps(self)
        self.require_lengths("height", "width", "min_tiles", "max_tiles", "patch_size", "merge_size")
        least, most, tolerance = self.min_pixels, self.max_pixels, self.max_pixels_tolerance
        self.require(
            is_int(least) and is_int(most) and 1 <= least <= most,
            f"min_pixels {least!r} and max_pixels {most!r} do not fit",
        )
        self.require(
            isinstance(tolerance, int | float) and 0 < tolerance < math.inf,
            f"max_pixels_tolerance must be a positive number, not {tolerance!r}",
        )
        tile, factor = self.height, self.patch_size * self.merge_size
        self.require(
            self.width == tile and tile % factor == 0,
            f"tiles of {self.width}x{tile} are not squares of whole visual tokens; their edge must be a "
            f"multiple of {factor}",
        )
        self.require(
            self.min_tiles <= self.max_tiles and 2 <= self.max_tiles <= MOST_TILES,
            f"{self.min_tiles} to {self.max_tiles} tiles do not fit; the most must be 2 to {MOST_TILES}",
        )
        super().check()
        whole, (height, width) = self.layout.whole, self.image_size
        self.require(
            whole is None or math.prod(whole) <= max(self.max_pixels, tile * tile),
            f"image size {width}x{height} is too long and thin to be shown as a whole",
        )

    def layout_of(self, picture: Size) -> Layout | None:
        factor = self.patch_size * self.merge_size
        if not is_cut(picture, factor, self.max_pixels * self.max_pixels_tolerance, self.patch_size):
            return None
        tile = (self.height, self.width)
        grid = best_grid(picture, tile, _grids(self.min_tiles, self.max_tiles))
        if grid == (1, 1):
            return None  # one stretched tile, which not every picture fits; vtp does not cut it
        whole = own_size(picture, factor, self.min_pixels, self.max_pixels)
        return Layout(grid, tile, whole if self.use_thumbnail else None)

    def patches(self, image: Image.Image, size: Size, grid: tuple[int, int]) -> np.ndarray:
        return _patches(image, size, grid, self, self.patch_size)


def is_cut(picture: Size, factor: int, most: float, least_edge: int) -> bool:
    """transformers' rule: whether a picture has more than `most` pixels once its edges are multiples of
    `factor`, and at least `least_edge`."""
    rows, columns = (max(least_edge, round(edge / factor) * factor) for edge in picture)
    return rows * columns > most


@lru_cache(maxsize=8)
def _grids(least: int, most: int) -> list[tuple[int, int]]:
    """(columns, rows) of `least` to `most` tiles, the fewest first; of equally many in transformers' order,
    which is that of a set."""
    found = {
        (columns, rows)
        for count in range(least, most + 1)
        for columns in range(1, count + 1)
        for rows in range(1, count + 1)
        if least <= columns * rows <= most
    }
    return sorted(found, key=math.prod)


def _require_steps(spec: ImageSpec) -> None:
    """Raise `VtpError` for other steps than those of this module."""
    spec.require(spec.resample == BILINEAR, f"resample must be {BILINEAR}, not {spec.resample}")
    spec.require(spec.do_rescale and spec.do_normalize, f"kind {spec.kind} needs do_rescale and do_normalize")


def _patches(
    image: Image.Image, size: Size, grid: tuple[int, int], spec: ImageSpec, patch: int
) -> np.ndarray:
    """A picture resized to `size`, normalised, cut into a grid of tiles, and these into patches row by row:
    float32 [patches, patch x patch x 3]."""
    values = _normalised(resize_fixed_point(np.asarray(image), size), spec)
    (rows, columns), (height, width) = grid, size
    parts = values.reshape(rows, height // rows // patch, patch, columns, width // columns // patch, patch, 3)
    return np.ascontiguousarray(parts.transpose(0, 3, 1, 4, 2, 5, 6)).reshape(-1, 3 * patch * patch)


def _normalised(pixels: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """uint8 [.,3] -> float32; torch rounds mean and deviation to float32 before it multiplies them."""
    whole = np.float32(1.0 / spec.rescale_factor)
    mean, std = (np.array(numbers, np.float32) * whole for numbers in (spec.mean, spec.std))
    return (pixels.astype(np.float32) - mean) / std


def default_size(min_pixels: int, max_pixels: int, factor: int) -> Size:
    """The size of a bundle for which none was asked: the largest square that the processor gives."""
    side = math.isqrt(max_pixels) // factor * factor
    return own_size((max(side, factor),) * 2, factor, min_pixels, max_pixels)


def own_size(picture: Size, factor: int, least: int, most: int) -> Size:
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
