"""Kind "idefics3": Idefics3 and SmolVLM. The picture's parts, then the whole picture as a last tile.

Source: transformers' image_processing_pil_idefics3.py and image_processing_pil_smolvlm.py, which agree. The
longest edge is resized to `longest_edge`, then both edges up to whole tiles, then the result is cut; the
whole picture is the same once more, resized to one tile. A picture of one tile is not followed by the whole.
Without `do_image_splitting` every picture is stretched to one tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from vtp.runtime.preprocess.fit import fitted_size, pad, padded_box
from vtp.runtime.preprocess.pixels import cut_tiles, resize, values_of
from vtp.runtime.preprocess.spec import Box, ImageSpec, Size

FIELDS = (
    *("image_height", "image_width", "fit", "height", "width"),
    *("longest_edge", "do_image_splitting"),
)
_LONGEST = 4096  # whatever longest_edge says


def check(spec: ImageSpec) -> None:
    """Square tiles, and an image size made of them that the processor gives to some picture."""
    spec.require_all("image_height", "image_width", "height", "width", "longest_edge")
    spec.require(
        spec.height == spec.width, f"tiles of {spec.width}x{spec.height} are not square, as this kind needs"
    )
    (height, width), tile = spec.image_size, spec.tile[0]
    spec.require(
        height % tile == 0 and width % tile == 0,
        f"image size {width}x{height} is not made of whole tiles; give multiples of {tile}",
    )
    if spec.do_image_splitting:
        longest = _up_to(min(spec.longest_edge or 0, _LONGEST), tile)
        spec.require(
            max(height, width) == longest,
            f"the longest edge of image size {width}x{height} is not {longest}, as size.longest_edge "
            f"{spec.longest_edge} makes it",
        )
    else:
        spec.require(
            spec.image_size == spec.tile,
            f"image size {width}x{height} is not one tile of {tile}, and do_image_splitting is off",
        )


def size(spec: ImageSpec) -> Size:
    """(H, W) of one tile."""
    return spec.tile


def tiles(spec: ImageSpec) -> tuple[int, int]:
    """(rows, columns) of the tiles before the whole picture; (1, 1) where there is but one tile."""
    return spec.image_size[0] // spec.tile[0], spec.image_size[1] // spec.tile[1]


def shape(spec: ImageSpec) -> tuple[int, ...]:
    """[rows x columns + 1, 3, H, W], the whole picture last; [1, 3, H, W] for one tile."""
    count = math.prod(tiles(spec))
    return (count + 1 if count > 1 else 1, 3, *spec.tile)


def default_size(longest_edge: int, tile: int, splitting: bool) -> Size:
    """The size of a bundle for which none was asked: the one that the processor gives to a square."""
    side = _up_to(min(longest_edge, _LONGEST), tile) if splitting else tile
    return side, side


def pixels(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Fit, resize, then the parts and the whole picture: float32 [rows x columns + 1, 3, H, W]."""
    plan = _plan(spec, (image.height, image.width))
    image = pad(image, plan.fitted, spec)
    for step in plan.steps:
        image = resize(image, step, spec)
    parts = cut_tiles(values_of(image, spec), spec.tile)
    if len(parts) == 1:
        return parts
    whole = values_of(resize(image, spec.tile, spec), spec)
    return np.concatenate([parts, whole[None]])


def boxes(spec: ImageSpec, width: int, height: int) -> tuple[Box, ...]:
    """The parts, then, unless there is but one, the whole picture."""
    whole = padded_box((height, width), _plan(spec, (height, width)).fitted)
    parts = whole.cut(*tiles(spec))
    return parts if len(parts) == 1 else (*parts, whole)


class _Plan(NamedTuple):
    fitted: Size  # after padding to the bundle's aspect
    steps: list[Size]  # the sizes to resize to, one after the other


def _plan(spec: ImageSpec, picture: Size) -> _Plan:
    own = _steps(spec, picture)
    fitted = fitted_size(spec, picture, own[-1], spec.image_size)
    steps = own if fitted == picture else _steps(spec, fitted)
    # What was padded or stretched goes to the bundle's size at once where two steps would miss it.
    return _Plan(fitted, steps if steps[-1] == spec.image_size else [spec.image_size])


def _steps(spec: ImageSpec, picture: Size) -> list[Size]:
    """transformers' two resizings: the longest edge to its length, then both edges up to whole tiles."""
    first = _below(_to_longest(picture, spec.longest_edge or 1), _LONGEST)
    if not spec.do_image_splitting:
        return [first, spec.tile]
    tile, ratio = spec.tile[0], first[1] / first[0]
    if first[1] >= first[0]:
        width = _up_to(first[1], tile)
        return [first, (_up_to(int(width / ratio), tile), width)]
    height = _up_to(first[0], tile)
    return [first, (height, _up_to(int(height * ratio), tile))]


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
