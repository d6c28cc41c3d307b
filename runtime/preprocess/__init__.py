"""From a picture to `pixel_values`, bit for bit as transformers' PIL image processors make them.

The preprocessing is data (`ImageSpec`, one frozen dataclass for each kind), read from a model's processor
configuration at export (see `vtp.export.checkpoint.processors`) and kept in the bundle (see `kinds`).
Resizing is Pillow's own, and the arithmetic on pixels is done once for each of the 256 values and looked up,
which gives the same bits as doing it per pixel.

Some processors cut a picture into as many tiles or patches as its size suggests. A bundle's shapes are fixed,
so such a spec holds the one image size that the bundle was made for, and every picture is brought to that
layout (see `vtp.runtime.preprocess.fit`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vtp.engines.errors import VtpError
from vtp.runtime.preprocess.base import Box, ImageSpec
from vtp.runtime.preprocess.clip import CLIP_FITS
from vtp.runtime.preprocess.fit import FITS
from vtp.runtime.preprocess.kinds import ImageSection, spec_from_json, spec_to_json

__all__ = [
    "CLIP_FITS",
    "FITS",
    "Box",
    "ImageSection",
    "ImageSpec",
    "preprocess",
    "source_box",
    "source_boxes",
    "spec_from_json",
    "spec_to_json",
]


def preprocess(image: Image.Image | Sequence[Image.Image], spec: ImageSpec) -> np.ndarray:
    """Turn an RGB image (see `vtp.runtime.media.images.load_image`) into float32 `pixel_values`.

    Their shape is `spec.shape`: [1, 3, H, W]; [tiles, 3, H, W] for kinds that cut tiles; [patches, values]
    for those that hand patches over; [frames, 3, H, W] of a clip, a list of that many images. Raises
    `VtpError` for another mode, for a picture so long and thin that it cannot be processed, for one of
    another layout where the spec's `fit` is "refuse", for a picture in the place of a clip and the other way
    round.
    """
    if spec.frames is None:
        if isinstance(image, Image.Image):
            return _pixels(image, spec)
        raise VtpError("this bundle answers about pictures, not videos; export it again with --frames")
    if isinstance(image, Image.Image) or len(image) != spec.frames:
        given = "a picture" if isinstance(image, Image.Image) else f"{len(image)} frames"
        raise VtpError(f"this bundle answers about videos of {spec.frames} frames, not about {given}")
    return np.concatenate([_pixels(frame, spec) for frame in image])


def _pixels(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    if image.mode != "RGB":
        raise VtpError(
            f"preprocess takes RGB images, not mode {image.mode}; open the picture with load_image"
        )
    return spec.pixels(image)


def source_box(spec: ImageSpec, width: int, height: int) -> Box:
    """Where the model's input, all of its tiles together, lies in a source picture of `width` x `height`.

    The map is linear: column u of W input columns shows source column left + u / W * (right - left).
    """
    boxes = source_boxes(spec, width, height)
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return Box(min(lefts), min(tops), max(rights), max(bottoms))


def source_boxes(spec: ImageSpec, width: int, height: int) -> tuple[Box, ...]:
    """Where each tile of `pixel_values` lies in a source picture, in the order of the tiles."""
    return spec.boxes(width, height)
