"""Bringing a picture to the one layout that a bundle was made for.

A picture that the model's own processor would lay out as the bundle does goes through unchanged, and its
`pixel_values` are transformers'. For any other, the spec's `fit` says what happens:

letterbox   it is padded in the mean colour, centred, to the aspect of the bundle's image size, at its own
            resolution; so shapes keep their proportions, and the only resizing is the processor's.
stretch     it is resized to the layout as it is; shapes are distorted.
refuse      it is refused, in one line.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from vtp.engines.errors import VtpError
from vtp.runtime.media.images import MAX_PIXELS
from vtp.runtime.preprocess.base import Box, ImageSpec, Size, is_int
from vtp.runtime.preprocess.pixels import check_area, mean_colour, paste

T = TypeVar("T")
FITS = ("letterbox", "stretch", "refuse")


@dataclass(frozen=True, kw_only=True)
class FittedSpec(ImageSpec):
    """A kind that is made for one image size, `image_height` x `image_width`.

    `fit` ("letterbox", "stretch", "refuse") says what becomes of a picture that the processor would lay out
    otherwise.
    """

    image_height: int
    image_width: int
    fit: str = "letterbox"

    def check(self) -> None:
        """Raise VtpError in one line for a size, a fit or a setting that no picture can go through."""
        super().check()
        self.require_lengths("image_height", "image_width")
        self.require(self.do_resize, f"kind {self.kind} needs do_resize")
        self.require(self.fit in FITS, f"fit must be one of {', '.join(FITS)}, not {self.fit!r}")
        self.require(
            math.prod(self.image_size) <= MAX_PIXELS,
            f"image size {self.image_width}x{self.image_height} is too large; at most {MAX_PIXELS:,} pixels",
        )

    @property
    def image_size(self) -> Size:
        return self.image_height, self.image_width

    def fitted_size(self, picture: Size, own: object, made_for: object) -> Size:
        """(height, width) after padding a picture of size `picture`.

        `own` is the layout that the processor would choose for it, `made_for` the bundle's; raises
        `VtpError` where they differ and the spec says to refuse, and for a picture too long to be padded.
        """
        if own == made_for or self.fit == "stretch":
            return picture
        height, width = self.image_size
        if self.fit == "refuse":
            raise VtpError(
                f"a picture of {picture[1]}x{picture[0]} does not have the layout that this bundle was made "
                f"for, that of {width}x{height} pixels; crop or resize the picture, or export with "
                "--image-fit letterbox"
            )
        padded = _padded(picture, (height, width))
        check_area(picture, padded, f"padded to the shape of {width}x{height}")
        return padded


@dataclass(frozen=True, kw_only=True)
class OneViewSpec(FittedSpec):
    """A kind that shows a picture in one view, of the bundle's image size."""

    @abstractmethod
    def own_size(self, picture: Size) -> Size:
        """(height, width) that the processor gives a picture of that size."""

    @property
    def fixed_size(self) -> Size:
        """(H, W) of the resized picture."""
        return self.image_size

    def require_multiples(self, factor: int, units: str) -> None:
        """Raise `VtpError` unless both edges are whole `units` of `factor` pixels."""
        height, width = self.image_size
        self.require(
            height % factor == 0 and width % factor == 0,
            f"image size {width}x{height} is not made of whole {units}; give multiples of {factor}",
        )

    def require_pixels(self, min_pixels: int, max_pixels: int) -> None:
        """Raise `VtpError` unless the image size has as many pixels as the processor gives pictures."""
        for name, count in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            self.require(is_int(count) and count >= 1, f"{name} must be positive, not {count!r}")
        (height, width), area = self.image_size, math.prod(self.image_size)
        self.require(
            min_pixels <= area <= max_pixels,
            f"image size {width}x{height} has {area} pixels; this processor takes {min_pixels} to "
            f"{max_pixels}",
        )

    def padded(self, image: Image.Image) -> Image.Image:
        """A picture padded to the view's shape, where the processor would give it another."""
        return pad(image, self._fitted((image.height, image.width)), self)

    def boxes(self, width: int, height: int) -> tuple[Box, ...]:
        """The whole picture with its padding."""
        return (padded_box((height, width), self._fitted((height, width))),)

    def _fitted(self, picture: Size) -> Size:
        return self.fitted_size(picture, self.own_size(picture), self.image_size)


@dataclass(frozen=True, kw_only=True)
class TiledSpec(FittedSpec):
    """A kind that cuts a picture into tiles of `height` x `width`, beside the whole picture."""

    height: int
    width: int

    def check(self) -> None:
        super().check()
        self.require_lengths("height", "width")

    def require_square_tiles(self) -> None:
        """Raise `VtpError` unless a tile is as high as it is wide."""
        self.require(
            self.height == self.width,
            f"tiles of {self.width}x{self.height} are not square, as this kind needs",
        )

    @property
    def tile(self) -> Size:
        """(H, W) of one tile."""
        return self.height, self.width

    @property
    def fixed_size(self) -> Size:
        return self.tile

    @property
    def views(self) -> int:
        return self.shape[0]

    @property
    def tiles(self) -> tuple[int, int]:
        """(rows, columns) of the tiles, the whole picture apart; (1, 1) if there is but one."""
        return self.image_height // self.height, self.image_width // self.width


class Layout(NamedTuple):
    """How a processor cuts a picture: `grid` (rows, columns) of tiles of (height, width) `tile`, and the size
    at which it shows the picture as a whole; None: it does not."""

    grid: tuple[int, int]
    tile: Size
    whole: Size | None


@dataclass(frozen=True, kw_only=True)
class UnlikeTilesSpec(FittedSpec):
    """A kind that shows a picture in tiles and as a whole of another shape, all handed over as patches.

    The layout is the one that the processor gives a picture of the bundle's image size. `patch_size` cuts the
    views, `merge_size` patches an edge make a token. A row of `pixel_values` is one patch.
    """

    whole_first: ClassVar[bool]

    patch_size: int
    merge_size: int

    def check(self) -> None:
        """An image size that the processor cuts into tiles, of no more pixels than are processed."""
        super().check()
        self.require_lengths("patch_size", "merge_size")
        (height, width), found = self.image_size, self.layout_of(self.image_size)
        self.require(
            found is not None,
            f"image size {width}x{height} is shown in one piece, and kind {self.kind} cuts tiles",
        )
        self.require(
            math.prod(self.layout.grid) * math.prod(self.layout.tile) <= MAX_PIXELS,
            f"the tiles of image size {width}x{height} are too large; at most {MAX_PIXELS:,} pixels",
        )

    @abstractmethod
    def layout_of(self, picture: Size) -> Layout | None:
        """How the processor cuts a picture of that size; None: it shows it in one piece."""

    @abstractmethod
    def patches(self, image: Image.Image, size: Size, grid: tuple[int, int]) -> np.ndarray:
        """A picture resized to `size` and cut into a grid of tiles: float32 [patches, values], by tile."""

    @property
    def layout(self) -> Layout:
        """The bundle's; see `check`."""
        found = self.layout_of(self.image_size)
        assert found is not None
        return found

    @property
    def fixed_size(self) -> Size:
        return self.layout.tile

    @property
    def view_grids(self) -> tuple[tuple[int, int], ...]:
        rows, columns = self.layout.grid
        return self._in_order([self._patched(self.layout.tile)] * (rows * columns), self._patched)

    @property
    def view_tokens(self) -> tuple[int, ...]:
        return tuple(rows * columns // self.merge_size**2 for rows, columns in self.view_grids)

    @property
    def views(self) -> int:
        return len(self.view_grids)

    @property
    def shape(self) -> tuple[int, ...]:
        """[patches of all views, 3 x patch x patch]."""
        return sum(rows * columns for rows, columns in self.view_grids), 3 * self.patch_size**2

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Fit, then the tiles and the picture as a whole: float32 [patches, 3 x patch x patch]."""
        image = pad(image, self._fitted((image.height, image.width)), self)
        (rows, columns), (height, width), _ = self.layout
        tiles = self.patches(image, (rows * height, columns * width), (rows, columns))
        return np.concatenate(self._in_order([tiles], lambda whole: self.patches(image, whole, (1, 1))))

    def boxes(self, width: int, height: int) -> tuple[Box, ...]:
        """The tiles, and the whole picture in front of them or behind."""
        whole = padded_box((height, width), self._fitted((height, width)))
        return self._in_order(whole.cut(*self.layout.grid), lambda _: whole)

    def _in_order(self, tiles: Iterable[T], make: Callable[[Size], T]) -> tuple[T, ...]:
        """What is known of the tiles, and what `make` says of the whole picture's size, if that is shown."""
        whole = () if self.layout.whole is None else (make(self.layout.whole),)
        return (*whole, *tiles) if self.whole_first else (*tiles, *whole)

    def _patched(self, size: Size) -> tuple[int, int]:
        return size[0] // self.patch_size, size[1] // self.patch_size

    def _fitted(self, picture: Size) -> Size:
        return self.fitted_size(picture, self.layout_of(picture), self.layout)


def _padded(picture: Size, shape: Size) -> Size:
    """The smallest size that holds the picture and has the aspect of `shape`, to the nearest pixel."""
    (height, width), (rows, columns) = picture, shape
    if width * rows > height * columns:
        return max(height, (2 * width * rows + columns) // (2 * columns)), width
    return height, max(width, (2 * height * columns + rows) // (2 * rows))


def pad(image: Image.Image, size: Size, spec: ImageSpec) -> Image.Image:
    """Pad a picture to `fitted_size`'s answer."""
    return paste(image, size, mean_colour(spec))


def padded_box(picture: Size, padded: Size) -> Box:
    """Where the padded picture lies, in pixels of the picture before padding."""
    left, top = (padded[1] - picture[1]) // 2, (padded[0] - picture[0]) // 2
    return Box(-left, -top, padded[1] - left, padded[0] - top)
