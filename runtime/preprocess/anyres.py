"""Kind "anyres": LLaVA-NeXT and LLaVA-OneVision. The whole picture as a first tile, then its parts.

Source: transformers' image_processing_pil_llava_next.py and image_processing_pil_llava_onevision.py, which
agree for one picture. Of the processor's resolutions ("pinpoints") the one that suits the bundle's image size
is the bundle's; a picture is resized into it with its proportions kept, padded with black, and cut. Which of
the features behind the black the model drops ("unpadding") follows from the image size: the family's matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image

from vtp.runtime.preprocess.base import LONGEST_EDGE, Box, Size, is_int
from vtp.runtime.preprocess.fit import TiledSpec, pad, padded_box
from vtp.runtime.preprocess.pixels import cut_tiles, paste, resize, values_of


@dataclass(frozen=True, kw_only=True)
class AnyresSpec(TiledSpec):
    """[tiles, 3, `height`, `width`]: the whole picture, then its parts at the best of `pinpoints`.

    `pinpoints` holds the processor's resolutions, (height, width) each.
    """

    kind: ClassVar[str] = "anyres"

    pinpoints: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "pinpoints", tuple(tuple(point) for point in self.pinpoints))
        super().__post_init__()

    def check(self) -> None:
        """Square tiles, and resolutions made of them."""
        super().check()
        for point in self.pinpoints:
            fits = len(point) == 2 and all(is_int(edge) and 1 <= edge <= LONGEST_EDGE for edge in point)
            self.require(fits, f"a resolution must be two edges of 1 to {LONGEST_EDGE}, not {list(point)}")
        self.require_square_tiles()
        self.require(bool(self.pinpoints), "pinpoints holds no resolution")
        for point in self.pinpoints:
            self.require(
                all(edge % self.height == 0 for edge in point),
                f"the resolution {list(point)} is not made of whole tiles of {self.height}",
            )

    @property
    def tiles(self) -> tuple[int, int]:
        """(rows, columns) of the tiles that follow the whole picture."""
        height, width = self.resolution
        return height // self.height, width // self.width

    @property
    def resolution(self) -> Size:
        """(H, W) of the pinpoint that suits the bundle's image size."""
        return best_resolution(self.image_size, self.pinpoints)

    @property
    def shape(self) -> tuple[int, ...]:
        """[1 + rows x columns, 3, H, W]; the whole picture comes first."""
        return (1 + math.prod(self.tiles), 3, *self.tile)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Fit, then the whole picture and its parts: float32 [1 + rows x columns, 3, H, W]."""
        plan = self._plan((image.height, image.width))
        image = pad(image, plan.fitted, self)
        parts = paste(resize(image, plan.resized, self), self.resolution, (0, 0, 0))
        whole = values_of(resize(image, self.tile, self), self)
        return np.concatenate([whole[None], cut_tiles(values_of(parts, self), self.tile)])

    def boxes(self, width: int, height: int) -> tuple[Box, ...]:
        """The whole picture, then its parts; those reach over the black."""
        plan = self._plan((height, width))
        whole = padded_box((height, width), plan.fitted)
        target = self.resolution
        scale = [plan.fitted[axis] / plan.resized[axis] for axis in (0, 1)]
        black = [(target[axis] - plan.resized[axis]) // 2 * scale[axis] for axis in (0, 1)]
        left, top = whole.left - black[1], whole.top - black[0]
        canvas = Box(left, top, left + target[1] * scale[1], top + target[0] * scale[0])
        return (whole, *canvas.cut(*self.tiles))

    def _plan(self, picture: Size) -> _Plan:
        target = self.resolution
        made_for = resized_within(self.image_size, target)
        fitted = self.fitted_size(picture, resized_within(picture, target), made_for)
        return _Plan(fitted, made_for if self.fit == "stretch" else resized_within(fitted, target))


class _Plan(NamedTuple):
    fitted: Size  # after padding to the bundle's aspect
    resized: Size  # within the resolution, the rest being black


def default_size(pinpoints: Sequence[Size], tile: int) -> Size:
    """The size of a bundle for which none was asked: two by two tiles, or the smallest that there is."""
    return (2 * tile, 2 * tile) if (2 * tile, 2 * tile) in pinpoints else min(pinpoints, key=math.prod)


def best_resolution(picture: Size, pinpoints: Sequence[Size]) -> Size:
    """transformers' choice: the most of the picture's own pixels used, then the fewest wasted."""
    height, width = picture
    best, most_used, least_wasted = pinpoints[0], 0, math.inf
    for point in pinpoints:
        scale = min(point[1] / width, point[0] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        wasted = point[0] * point[1] - used
        if used > most_used or (used == most_used and wasted < least_wasted):
            best, most_used, least_wasted = point, used, wasted
    return best


def resized_within(picture: Size, target: Size) -> Size:
    """(height, width) of a picture resized into `target` with its proportions kept, rounded up."""
    scale_x, scale_y = target[1] / picture[1], target[0] / picture[0]
    if scale_x < scale_y:
        return min(math.ceil(picture[0] * scale_x), target[0]), target[1]
    return target[0], min(math.ceil(picture[1] * scale_y), target[1])
