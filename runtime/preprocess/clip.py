"""Kind "clip": one view. Pad to a square, resize, crop, each behind its switch.

Serves CLIP, SigLIP (PaliGemma), LLaVA, Video-LLaVA's pictures, Gemma 3 without pan and scan, and
InternVL at one tile.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from vtp.engines.errors import VtpError
from vtp.runtime.preprocess.pixels import check_area, mean_colour, paste, resize, values_of
from vtp.runtime.preprocess.spec import Box, ImageSpec, Size

FIELDS = (
    *("do_pad", "shortest_edge", "height", "width", "do_center_crop", "crop_height", "crop_width"),
    "frames",
)


def check(spec: ImageSpec) -> None:
    """Sizes for the steps that are switched on, and no others."""
    sizes = tuple(size is not None for size in (spec.shortest_edge, spec.height, spec.width))
    spec.require(
        not spec.do_resize or sizes in ((True, False, False), (False, True, True)),
        "resizing needs either shortest_edge, or height and width",
    )
    spec.require(
        not spec.do_center_crop or (spec.crop_height is not None and spec.crop_width is not None),
        "center cropping needs crop_height and crop_width",
    )


def size(spec: ImageSpec) -> Size:
    """(H, W) of `pixel_values`; raises `VtpError` where it depends on the picture."""
    if spec.do_center_crop:
        return spec.crop_height or 0, spec.crop_width or 0
    if spec.do_resize and spec.height and spec.width:
        return spec.height, spec.width
    if spec.do_resize and spec.do_pad and spec.shortest_edge:
        return spec.shortest_edge, spec.shortest_edge
    raise VtpError(
        "this image processor gives each picture another size; a static graph needs do_center_crop, "
        "or a size with height and width"
    )


def shape(spec: ImageSpec) -> tuple[int, ...]:
    """[1, 3, H, W]; of a clip [frames, 3, H, W]."""
    return (spec.frames or 1, 3, *size(spec))


def pixels(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Pad, resize and crop with Pillow, then look every pixel value up; float32 [1, 3, H, W]."""
    plan = _plan(spec, image.height, image.width)
    image = paste(image, plan.padded, mean_colour(spec))
    if spec.do_resize:
        image = resize(image, plan.resized, spec)
    if spec.do_center_crop:
        top, left = plan.crop
        image = image.crop((left, top, left + plan.output[1], top + plan.output[0]))
    return values_of(image, spec)[None]


def boxes(spec: ImageSpec, width: int, height: int) -> tuple[Box, ...]:
    """Undo crop, resize and padding for the corners of the model's input."""
    plan = _plan(spec, height, width)
    scale = [plan.padded[axis] / plan.resized[axis] for axis in (0, 1)]
    top, left = (plan.crop[axis] * scale[axis] - plan.pad[axis] for axis in (0, 1))
    return (Box(left, top, left + plan.output[1] * scale[1], top + plan.output[0] * scale[0]),)


class _Plan(NamedTuple):
    """Sizes (height, width) and offsets (y, x) of every step, in pixels."""

    padded: Size
    pad: Size
    resized: Size
    crop: Size
    output: Size


def _plan(spec: ImageSpec, height: int, width: int) -> _Plan:
    """Follow one picture's size through the steps, before any memory is spent on it."""
    side = max(width, height)
    padded = (side, side) if spec.do_pad else (height, width)
    pad = ((padded[0] - height) // 2, (padded[1] - width) // 2)
    resized = _resized_size(spec, *padded) if spec.do_resize else padded
    for step, size in (("padded to a square", padded), ("resized for this model", resized)):
        check_area((height, width), size, step)
    output = (spec.crop_height or 0, spec.crop_width or 0) if spec.do_center_crop else resized
    crop = ((resized[0] - output[0]) // 2, (resized[1] - output[1]) // 2)
    return _Plan(padded, pad, resized, crop, output)


def _resized_size(spec: ImageSpec, height: int, width: int) -> Size:
    """(height, width) after resizing, rounded as transformers rounds: down, in float arithmetic."""
    if spec.height and spec.width:
        return spec.height, spec.width
    edge = spec.shortest_edge or 0
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)
