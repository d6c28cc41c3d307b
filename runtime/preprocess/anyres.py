"""Kind "anyres": LLaVA-NeXT and LLaVA-OneVision. The whole picture as a first tile, then its parts.

Source: transformers' image_processing_pil_llava_next.py and image_processing_pil_llava_onevision.py, which
agree for one picture. Of the processor's resolutions ("pinpoints") the one that suits the bundle's image size
is the bundle's; a picture is resized into it with its proportions kept, padded with black, and cut. Which of
the features behind the black the model drops ("unpadding") follows from the image size: the family's matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from vtp.runtime.preprocess.fit import fitted_size, pad, padded_box
from vtp.runtime.preprocess.pixels import cut_tiles, paste, resize, values_of
from vtp.runtime.preprocess.spec import Box, ImageSpec, Size

FIELDS = ("image_height", "image_width", "fit", "height", "width", "pinpoints")


def check(spec: ImageSpec) -> None:
    """Square tiles, and resolutions made of them."""
    spec.require_all("image_height", "image_width", "height", "width")
    spec.require(
        spec.height == spec.width, f"tiles of {spec.width}x{spec.height} are not square, as this kind needs"
    )
    spec.require(bool(spec.pinpoints), "pinpoints holds no resolution")
    for point in spec.pinpoints:
        spec.require(
            all(edge % (spec.height or 1) == 0 for edge in point),
            f"the resolution {list(point)} is not made of whole tiles of {spec.height}",
        )


def size(spec: ImageSpec) -> Size:
    """(H, W) of one tile."""
    return spec.tile


def tiles(spec: ImageSpec) -> tuple[int, int]:
    """(rows, columns) of the tiles that follow the whole picture."""
    height, width = resolution(spec)
    return height // spec.tile[0], width // spec.tile[1]


def resolution(spec: ImageSpec) -> Size:
    """(H, W) of the pinpoint that suits the bundle's image size."""
    return best_resolution(spec.image_size, spec.pinpoints)


def shape(spec: ImageSpec) -> tuple[int, ...]:
    """[1 + rows x columns, 3, H, W]; the whole picture comes first."""
    return (1 + math.prod(tiles(spec)), 3, *spec.tile)


def default_size(pinpoints: Sequence[Size], tile: int) -> Size:
    """The size of a bundle for which none was asked: two by two tiles, or the smallest that there is."""
    return (2 * tile, 2 * tile) if (2 * tile, 2 * tile) in pinpoints else min(pinpoints, key=math.prod)


def pixels(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Fit, then the whole picture and its parts: float32 [1 + rows x columns, 3, H, W]."""
    plan = _plan(spec, (image.height, image.width))
    image = pad(image, plan.fitted, spec)
    parts = paste(resize(image, plan.resized, spec), resolution(spec), (0, 0, 0))
    whole = values_of(resize(image, spec.tile, spec), spec)
    return np.concatenate([whole[None], cut_tiles(values_of(parts, spec), spec.tile)])


def boxes(spec: ImageSpec, width: int, height: int) -> tuple[Box, ...]:
    """The whole picture, then its parts; those reach over the black."""
    plan = _plan(spec, (height, width))
    whole = padded_box((height, width), plan.fitted)
    target = resolution(spec)
    scale = [plan.fitted[axis] / plan.resized[axis] for axis in (0, 1)]
    black = [(target[axis] - plan.resized[axis]) // 2 * scale[axis] for axis in (0, 1)]
    left, top = whole.left - black[1], whole.top - black[0]
    canvas = Box(left, top, left + target[1] * scale[1], top + target[0] * scale[0])
    return (whole, *canvas.cut(*tiles(spec)))


class _Plan(NamedTuple):
    fitted: Size  # after padding to the bundle's aspect
    resized: Size  # within the resolution, the rest being black


def _plan(spec: ImageSpec, picture: Size) -> _Plan:
    target = resolution(spec)
    made_for = resized_within(spec.image_size, target)
    fitted = fitted_size(spec, picture, resized_within(picture, target), made_for)
    return _Plan(fitted, made_for if spec.fit == "stretch" else resized_within(fitted, target))


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
