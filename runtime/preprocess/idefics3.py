"""Kind "idefics3": Idefics3 and SmolVLM. The picture's parts, then the whole picture as a last tile.

Source: transformers' image_processing_pil_idefics3.py and image_processing_pil_smolvlm.py, which agree. The
longest edge is resized to `longest_edge`, then both edges up to whole tiles, then the result is cut; the
whole picture is the same once more, resized to one tile. A picture of one tile is not followed by the whole.
Without `do_image_splitting` every picture is stretched to one tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image

from vtp.runtime.preprocess.base import Box, Size
from vtp.runtime.preprocess.fit import TiledSpec, pad, padded_box
from vtp.runtime.preprocess.pixels import cut_tiles, resize, values_of

_LONGEST = 4096  # whatever longest_edge says


@dataclass(frozen=True, kw_only=True)
class Idefics3Spec(TiledSpec):
    """[tiles, 3, `height`, `width`]: the parts of a picture of `longest_edge`, then the whole of it.

    Without `do_image_splitting` one tile.
    """

    kind: ClassVar[str] = "idefics3"

    longest_edge: int
    do_image_splitting: bool = True

    def check(self) -> None:
        """Square tiles, and an image size made of them that the processor gives to some picture."""
        super().check()
        self.require_lengths("longest_edge")
        self.require_square_tiles()
        (height, width), tile = self.image_size, self.height
        self.require(
            height % tile == 0 and width % tile == 0,
            f"image size {width}x{height} is not made of whole tiles; give multiples of {tile}",
        )
        if self.do_image_splitting:
            longest = _up_to(min(self.longest_edge, _LONGEST), tile)
            self.require(
                max(height, width) == longest,
                f"the longest edge of image size {width}x{height} is not {longest}, as size.longest_edge "
                f"{self.longest_edge} makes it",
            )
        else:
            self.require(
                self.image_size == self.tile,
                f"image size {width}x{height} is not one tile of {tile}, and do_image_splitting is off",
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows x columns + 1, 3, H, W], the whole picture last; [1, 3, H, W] for one tile."""
        count = math.prod(self.tiles)
        return (count + 1 if count > 1 else 1, 3, *self.tile)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Fit, resize, then the parts and the whole picture: float32 [rows x columns + 1, 3, H, W]."""
        plan = self._plan((image.height, image.width))
        image = pad(image, plan.fitted, self)
        for step in plan.steps:
            image = resize(image, step, self)
        parts = cut_tiles(values_of(image, self), self.tile)
        if len(parts) == 1:
            return parts
        whole = values_of(resize(image, self.tile, self), self)
        return np.concatenate([parts, whole[None]])

    def boxes(self, width: int, height: int) -> tuple[Box, ...]:
        """The parts, then, unless there is but one, the whole picture."""
        whole = padded_box((height, width), self._plan((height, width)).fitted)
        parts = whole.cut(*self.tiles)
        return parts if len(parts) == 1 else (*parts, whole)

    def _plan(self, picture: Size) -> _Plan:
        own = self._steps(picture)
        fitted = self.fitted_size(picture, own[-1], self.image_size)
        steps = own if fitted == picture else self._steps(fitted)
        # What was padded or stretched goes to the bundle's size at once where two steps would miss it.
        return _Plan(fitted, steps if steps[-1] == self.image_size else [self.image_size])

    def _steps(self, picture: Size) -> list[Size]:
        """transformers' two resizings: the longest edge to its length, then both edges up to whole tiles."""
        first = _below(_to_longest(picture, self.longest_edge), _LONGEST)
        if not self.do_image_splitting:
            return [first, self.tile]
        tile, ratio = self.height, first[1] / first[0]
        if first[1] >= first[0]:
            width = _up_to(first[1], tile)
            return [first, (_up_to(int(width / ratio), tile), width)]
        height = _up_to(first[0], tile)
        return [first, (height, _up_to(int(height * ratio), tile))]


class _Plan(NamedTuple):
    fitted: Size  # after padding to the bundle's aspect
    steps: list[Size]  # the sizes to resize to, one after the other


def default_size(longest_edge: int, tile: int, splitting: bool) -> Size:
    """The size of a bundle for which none was asked: the one that the processor gives to a square."""
    side = _up_to(min(longest_edge, _LONGEST), tile) if splitting else tile
    return side, side


def _to_longest(picture: Size, longest: int) -> Size:
    """The longest edge becomes `longest`, the other keeps the proportions and is made even."""
    ratio = picture[1] / picture[0]
    if picture[1] >= picture[0]:
        return max(_even(int(longest / ratio)), 1), max(longest, 1)
    return max(longest, 1), max(_even(int(longest * ratio)), 1)


def _below(picture: Size, longest: int) -> Size:
    """No edge above `longest`."""
    ratio = picture[1] / picture[0]
    if max(picture) <= longest:
        return picture
    if picture[1] >= picture[0]:
        return max(int(longest / ratio), 1), longest
    return longest, max(int(longest * ratio), 1)


def _even(number: int) -> int:
    return number + number % 2


def _up_to(length: int, tile: int) -> int:
    return math.ceil(length / tile) * tile
