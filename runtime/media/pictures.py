"""The pictures of one prompt, or its video: checked when the prompt is taken, decoded when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, TypeAlias

import numpy as np

from vtp.engines.errors import UsageError, VtpError
from vtp.runtime.media.images import ImageSource, check_image, load_image
from vtp.runtime.media.videos import VideoSource, check_video, load_video
from vtp.runtime.preprocess import ImageSpec, preprocess
from vtp.runtime.result import Timings


class NoPicture(Enum):
    """What is given instead of pictures where a prompt has none, and that is meant.

    None and empty lists are refused: they are what failed reads and searches give.
    """

    NO_PICTURE = "no picture"


NO_PICTURE = NoPicture.NO_PICTURE

Images: TypeAlias = "ImageSource | VideoSource | Sequence[ImageSource] | NoPicture"  # of one prompt


class PictureError(VtpError):
    """A picture that cannot be decoded, or that the model cannot take: damaged, too large, too long.

    Its cause, if it has one, is a library's error, whose words are then in the text.
    """


class Pictures:
    """What a caller gave as `image`; its length is the number of pictures (a video is one, NO_PICTURE none).

    `pixels` holds pixel_values of one picture each, between `load` and `release`. `see` is told the width and
    height of each picture that is decoded (of a video, of its first frame).
    """

    def __init__(
        self,
        image: Any,
        spec: ImageSpec,
        color: str = "rgb",
        see: Callable[[int, int], None] = lambda width, height: None,
    ) -> None:
        several = spec.frames is None and isinstance(image, list | tuple)
        self._sources: Sequence[Any] = image if several else [] if image is NO_PICTURE else [image]
        self._spec, self._color, self._see = spec, color, see
        self.pixels: list[np.ndarray] = []
        if not self._sources and image is not NO_PICTURE:
            raise UsageError("no picture is given; give one, a list of at least one, or NO_PICTURE")

    def __len__(self) -> int:
        return len(self._sources)

    def check(self, timings: Timings) -> None:
        """Raise what `load` would, as far as that shows without decoding."""
        frames = self._spec.frames
        with timings.measure("preprocess"):
            for source in self._sources:
                check_image(source) if frames is None else check_video(source, frames)

    def load(self, timings: Timings) -> None:
        """Decode and preprocess; PictureError or UsageError for what cannot be."""
        with timings.measure("preprocess"):
            try:
                self.pixels = [preprocess(self._load_one(source), self._spec) for source in self._sources]
            except UsageError:
                raise
            except VtpError as error:
                raise PictureError(str(error)) from error.__cause__

    def _load_one(self, source: Any) -> Any:
        frames = self._spec.frames
        if frames is None:
            picture = load_image(source, self._color)
            self._see(*picture.size)
            return picture
        clip = load_video(source, frames, self._color)
        self._see(*clip[0].size)
        return clip

    def release(self) -> None:
        """Give the memory of `pixels` back."""
        self.pixels = []
