"""Kind "pixtral": Mistral 3 and Pixtral. One view at a fixed size, made of whole tokens.

Source: transformers' image_processing_pil_pixtral.py. A picture is shrunk until no edge is longer than
`longest_edge`, never enlarged, and both edges are then resized up to whole tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from vtp.runtime.preprocess.base import Size
from vtp.runtime.preprocess.fit import OneViewSpec
from vtp.runtime.preprocess.pixels import resize, values_of


@dataclass(frozen=True, kw_only=True)
class PixtralSpec(OneViewSpec):
    """[1, 3, H, W]; `patch_size` are the pixels of a token along an edge."""

    kind: ClassVar[str] = "pixtral"

    patch_size: int
    longest_edge: int

    def check(self) -> None:
        """An image size that the processor could give to some picture."""
        super().check()
        self.require_lengths("patch_size", "longest_edge")
        (height, width), token = self.image_size, self.patch_size
        self.require_multiples(token, "tokens")
        most = _up_to(self.longest_edge, token)
        self.require(
            max(height, width) <= most,
            f"image size {width}x{height} is larger than this processor makes pictures: {most}x{most}",
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """[1, 3, H, W]."""
        return 1, 3, *self.image_size

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Fit and resize: float32 [1, 3, H, W]."""
        image = self.padded(image)
        return values_of(resize(image, self.image_size, self), self)[None]

    def own_size(self, picture: Size) -> Size:
        """transformers' rule."""
        height, width = picture
        ratio = max(height / self.longest_edge, width / self.longest_edge)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        return _up_to(height, self.patch_size), _up_to(width, self.patch_size)


def default_size(longest: int, token: int) -> Size:
    """The size of a bundle for which none was asked: 448 x 448, or what the processor makes at most."""
    edge = _up_to(min(448, longest), token)
    return edge, edge


def _up_to(edge: int, token: int) -> int:
    """The smallest multiple of a token that is not shorter."""
    return -(-edge // token) * token
