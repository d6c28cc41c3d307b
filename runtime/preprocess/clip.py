"""Kind "clip": one view. Pad to a square, resize, crop, each behind its switch.

Serves CLIP, SigLIP (PaliGemma), LLaVA, Video-LLaVA's pictures, Gemma 3 without pan and scan, and
InternVL at one tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from vtp.engines.errors import UsageError, VtpError
from vtp.runtime.preprocess.base import Box, ImageSpec, Size
from vtp.runtime.preprocess.pixels import check_area, mean_colour, paste, resize, values_of

CLIP_FITS = ("crop", "letterbox", "stretch")
_SIZES = ("shortest_edge", "height", "width", "crop_height", "crop_width")


@dataclass(frozen=True, kw_only=True)
class ClipSpec(ImageSpec):
    """[1, 3, H, W], or of a video [frames, 3, H, W].

    `do_pad` to a square in the mean colour; `do_resize` so that the shorter edge is `shortest_edge`, or to
    exactly `height` x `width`; `do_center_crop` to `crop_height` x `crop_width`, black where the picture is
    smaller. With `frames` the bundle answers about videos of N frames, each made as a picture is.
    """

    kind: ClassVar[str] = "clip"

    do_pad: bool = False
    shortest_edge: int | None = None
    height: int | None = None
    width: int | None = None
    do_center_crop: bool = False
    crop_height: int | None = None
    crop_width: int | None = None
    frames: int | None = None

    def check(self) -> None:
        """Sizes for the steps that are switched on, and no others."""
        super().check()
        self.require_lengths(*_SIZES, "frames")
        sizes = tuple(size is not None for size in (self.shortest_edge, self.height, self.width))
        self.require(
            not self.do_resize or sizes in ((True, False, False), (False, True, True)),
            "resizing needs either shortest_edge, or height and width",
        )
        self.require(
            not self.do_center_crop or (self.crop_height is not None and self.crop_width is not None),
            "center cropping needs crop_height and crop_width",
        )

    def fitted(self, fit: str) -> ClipSpec:
        """The same for pictures that are not squares: what becomes of their sides.

        crop       the middle square is seen, and the longer sides are cut off, as CLIP's processor does
        letterbox  the whole picture is seen, padded to a square in the mean colour
        stretch    the whole picture is seen, resized as it is, as SigLIP's processor does

        UsageError for another word, and for a model whose input is not a square.
        """
        height, width = self.fixed_size
        if fit not in CLIP_FITS:
            raise UsageError(
                f"image-fit {fit} is not supported by this model's image processor, which takes pictures of "
                f"any shape; choose {', '.join(CLIP_FITS)}, or leave it out"
            )
        if height != width:
            raise UsageError(f"image-fit needs a model of square input, not {width}x{height}; leave it out")
        one: dict[str, Any] = {"do_resize": True, "do_pad": fit == "letterbox", **dict.fromkeys(_SIZES)}
        if fit != "crop":
            return replace(self, **{**one, "do_center_crop": False, "height": height, "width": width})
        if self.do_center_crop and not self.do_pad:  # the processor's own way, to the pixel
            return self
        crop = {"do_center_crop": True, "crop_height": height, "crop_width": width}
        return replace(self, **{**one, "shortest_edge": height, **crop})

    @property
    def fixed_size(self) -> Size:
        """(H, W) of `pixel_values`; raises `VtpError` if it depends on the picture."""
        if self.do_center_crop:
            return self.crop_height or 0, self.crop_width or 0
        if self.do_resize and self.height and self.width:
            return self.height, self.width
        if self.do_resize and self.do_pad and self.shortest_edge:
            return self.shortest_edge, self.shortest_edge
        raise VtpError(
            "this image processor gives each picture another size; a static graph needs do_center_crop, "
            "or a size with height and width"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """[1, 3, H, W]; of a clip [frames, 3, H, W]."""
        return (self.frames or 1, 3, *self.fixed_size)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Pad, resize and crop with Pillow, then look every pixel value up; float32 [1, 3, H, W]."""
        plan = self._plan(image.height, image.width)
        image = paste(image, plan.padded, mean_colour(self))
        if self.do_resize:
            image = resize(image, plan.resized, self)
        if self.do_center_crop:
            top, left = plan.crop
            image = image.crop((left, top, left + plan.output[1], top + plan.output[0]))
        return values_of(image, self)[None]

    def boxes(self, width: int, height: int) -> tuple[Box, ...]:
        """Undo crop, resize and padding for the corners of the model's input."""
        plan = self._plan(height, width)
        scale = [plan.padded[axis] / plan.resized[axis] for axis in (0, 1)]
        top, left = (plan.crop[axis] * scale[axis] - plan.pad[axis] for axis in (0, 1))
        return (Box(left, top, left + plan.output[1] * scale[1], top + plan.output[0] * scale[0]),)

    def _plan(self, height: int, width: int) -> _Plan:
        """Follow one picture's size through the steps, before any memory is spent on it."""
        side = max(width, height)
        padded = (side, side) if self.do_pad else (height, width)
        pad = ((padded[0] - height) // 2, (padded[1] - width) // 2)
        resized = self._resized_size(*padded) if self.do_resize else padded
        for step, size in (("padded to a square", padded), ("resized for this model", resized)):
            check_area((height, width), size, step)
        output = (self.crop_height or 0, self.crop_width or 0) if self.do_center_crop else resized
        crop = ((resized[0] - output[0]) // 2, (resized[1] - output[1]) // 2)
        return _Plan(padded, pad, resized, crop, output)

    def _resized_size(self, height: int, width: int) -> Size:
        """(height, width) after resizing, rounded as transformers rounds: down, in float arithmetic."""
        if self.height and self.width:
            return self.height, self.width
        edge = self.shortest_edge or 0
        if width <= height:
            return int(edge * height / width), edge
        return edge, int(edge * width / height)


class _Plan(NamedTuple):
    """Sizes (height, width) and offsets (y, x) of every step, in pixels."""

    padded: Size
    pad: Size
    resized: Size
    crop: Size
    output: Size
