"""Kind "gemma4": Gemma 4. One view at a fixed size, handed over as patches, row by row.

Source: transformers' image_processing_pil_gemma4.py. The processor gives a picture as many whole tokens of
pooling x pooling patches as its budget allows, at the picture's own shape; a bundle's image size stands for
one such layout. A patch's values lie pixel by pixel, their colours side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from vtp.engines.errors import VtpError
from vtp.runtime.preprocess.base import Size
from vtp.runtime.preprocess.fit import OneViewSpec
from vtp.runtime.preprocess.pixels import resize, values_of

BUDGETS = (70, 140, 280, 560, 1120)  # most tokens of a picture, of which the processor knows these


@dataclass(frozen=True, kw_only=True)
class Gemma4Spec(OneViewSpec):
    """[patches, values]: `patch_size` cuts the picture, `pooling_size` patches along an edge make one token.

    `max_soft_tokens` is the budget, the most tokens that a picture may have.
    """

    kind: ClassVar[str] = "gemma4"

    patch_size: int
    pooling_size: int
    max_soft_tokens: int

    def check(self) -> None:
        """An image size that the processor gives to a picture of that size."""
        super().check()
        self.require_lengths("patch_size", "pooling_size")
        self.require(
            self.max_soft_tokens in BUDGETS,
            f"max_soft_tokens must be one of {', '.join(map(str, BUDGETS))}, not {self.max_soft_tokens!r}",
        )
        (height, width), token = self.image_size, self.patch_size * self.pooling_size
        self.require_multiples(token, "tokens")
        self.require(
            _is_made(self.image_size, token, self.max_soft_tokens),
            f"image size {width}x{height} has {height * width // token**2} tokens of {token}x{token}, and no "
            f"picture is given as many with a budget of {self.max_soft_tokens}",
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """[patches, patch x patch x 3]."""
        rows, columns = (edge // self.patch_size for edge in self.image_size)
        return rows * columns, 3 * self.patch_size**2

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Fit, resize, patchify: float32 [patches, patch x patch x 3]."""
        image = resize(self.padded(image), self.image_size, self)
        patch, (height, width) = self.patch_size, self.image_size
        parts = values_of(image, self).reshape(3, height // patch, patch, width // patch, patch)
        return np.ascontiguousarray(parts.transpose(1, 3, 2, 4, 0)).reshape(self.shape)

    def own_size(self, picture: Size) -> Size:
        return _own_size(picture, self.patch_size, self.pooling_size, self.max_soft_tokens)


def default_size(patch: int, pooling: int, budget: int) -> Size:
    """The size of a bundle for which none was asked: the square of the processor's own budget."""
    return _own_size((1, 1), patch, pooling, budget)


def budget_for(size: Size, patch: int, pooling: int) -> int | None:
    """The smallest budget with which the processor makes `size` of some picture; None: it never does."""
    fits = (budget for budget in BUDGETS if _is_made(size, patch * pooling, budget))
    return next(fits, None)


def _is_made(size: Size, token: int, budget: int) -> bool:
    """Whether a picture of some shape fills `size`: one row and one column more would be over the budget."""
    rows, columns = (edge // token for edge in size)
    return 0 < rows * columns <= budget < (rows + 1) * (columns + 1)


def _own_size(picture: Size, patch: int, pooling: int, budget: int) -> Size:
    """transformers' rule: the largest whole tokens at about the picture's shape that keep to the budget."""
    height, width = picture
    token = patch * pooling
    scale = math.sqrt(budget * pooling**2 * patch**2 / (height * width))
    rows, columns = (math.floor(scale * edge / token) for edge in picture)
    if rows == 0:
        rows, columns = 1, min(width // height, budget)
    elif columns == 0:
        rows, columns = min(height // width, budget), 1
    if not 0 < rows * columns <= budget:
        raise VtpError(
            f"a picture of {width}x{height} is too long for {budget} tokens of this model; crop it first"
        )
    return rows * token, columns * token
