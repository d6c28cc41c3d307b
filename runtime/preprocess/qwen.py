"""Kind "qwen": Qwen2-VL, Qwen2.5-VL and Qwen3-VL. One view at a fixed size, handed over as patches.

Source: transformers' image_processing_pil_qwen2_vl.py. The picture is resized to multiples of
patch x merge, and each row of `pixel_values` is one patch (repeated for `temporal_patch_size` frames), in
the order in which the model merges patches: merge x merge neighbours follow one another.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from vtp.engines.errors import VtpError
from vtp.runtime.preprocess.fit import fitted_size, pad, padded_box
from vtp.runtime.preprocess.pixels import resize, values_of
from vtp.runtime.preprocess.spec import Box, ImageSpec, Size

FIELDS = (
    *("image_height", "image_width", "fit"),
    *("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"),
)
_MOST_UNEVEN = 200  # most that the longest edge may be, in shortest edges


def check(spec: ImageSpec) -> None:
    """An image size that the processor could give to some picture."""
    spec.require_all("image_height", "image_width", "min_pixels", "max_pixels")
    spec.require_all("patch_size", "temporal_patch_size", "merge_size")
    height, width = spec.image_size
    factor = _factor(spec)
    spec.require(
        height % factor == 0 and width % factor == 0,
        f"image size {width}x{height} is not made of whole merged patches; give multiples of {factor}",
    )
    least, most = spec.min_pixels or 0, spec.max_pixels or 0
    spec.require(
        least <= height * width <= most,
        f"image size {width}x{height} has {height * width} pixels; this processor takes {least} to {most}",
    )


def size(spec: ImageSpec) -> Size:
    """(H, W) of the resized picture."""
    return spec.image_size


def grid_thw(spec: ImageSpec) -> tuple[int, int, int]:
    """(1, rows, columns) of patches: the model's `image_grid_thw` for every picture of the bundle."""
    height, width = spec.image_size
    patch = spec.patch_size or 1
    return 1, height // patch, width // patch


def shape(spec: ImageSpec) -> tuple[int, ...]:
    """[patches, 3 x temporal x patch x patch]."""
    patch = spec.patch_size or 1
    return math.prod(grid_thw(spec)), 3 * (spec.temporal_patch_size or 1) * patch * patch


def default_size(min_pixels: int, max_pixels: int, factor: int) -> Size:
    """The size of a bundle for which none was asked: 448 x 448, within what the processor takes."""
    side = _smart_resize((448, 448), factor, min_pixels, max_pixels)
    return side


def pixels(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Fit, resize, patchify: float32 [patches, 3 x temporal x patch x patch]."""
    image = resize(pad(image, _fitted(spec, (image.height, image.width)), spec), spec.image_size, spec)
    patch, merge, times = spec.patch_size or 1, spec.merge_size or 1, spec.temporal_patch_size or 1
    _, rows, columns = grid_thw(spec)
    parts = values_of(image, spec).reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
    parts = parts.transpose(1, 4, 2, 5, 0, 3, 6)  # [rows, columns, merge, merge, 3, patch, patch]
    frames = np.broadcast_to(parts[:, :, :, :, :, None], (*parts.shape[:5], times, patch, patch))
    return np.ascontiguousarray(frames).reshape(shape(spec))


def boxes(spec: ImageSpec, width: int, height: int) -> tuple[Box, ...]:
    """The whole picture with its padding."""
    return (padded_box((height, width), _fitted(spec, (height, width))),)


def _fitted(spec: ImageSpec, picture: Size) -> Size:
    long, short = max(picture), min(picture)
    if long > _MOST_UNEVEN * short:
        raise VtpError(
            f"a picture of {picture[1]}x{picture[0]} is too long: one edge may be at most {_MOST_UNEVEN} "
            "times the other for this model; crop it first"
        )
    own = _smart_resize(picture, _factor(spec), spec.min_pixels or 0, spec.max_pixels or 0)
    return fitted_size(spec, picture, own, spec.image_size)


def _factor(spec: ImageSpec) -> int:
    return (spec.patch_size or 1) * (spec.merge_size or 1)


def _smart_resize(picture: Size, factor: int, least: int, most: int) -> Size:
    """transformers' rule: multiples of `factor` close to the picture's own size, `least` to `most` pixels."""
    height, width = picture
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor * factor > most:
        shrink = math.sqrt((height * width) / most)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor * factor < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor
