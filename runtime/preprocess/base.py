"""A bundle's preprocessing, as data: what all kinds share. Each kind's module has its own dataclass."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeGuard

import numpy as np
from PIL import Image

from vtp.engines.errors import VtpError

Size = tuple[int, int]  # (height, width), in pixels, as transformers writes sizes
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LONGEST_EDGE = 65_536


class Box(NamedTuple):
    """A rectangle in pixels of the source picture; where padding was added, it reaches beyond."""

    left: float
    top: float
    right: float
    bottom: float

    def cut(self, rows: int, columns: int) -> tuple[Box, ...]:
        """The box in `rows` x `columns` equal parts, row by row."""
        x = [self.left + (self.right - self.left) * part / columns for part in range(columns + 1)]
        y = [self.top + (self.bottom - self.top) * part / rows for part in range(rows + 1)]
        return tuple(
            Box(x[column], y[row], x[column + 1], y[row + 1])
            for row in range(rows)
            for column in range(columns)
        )


@dataclass(frozen=True, kw_only=True)
class ImageSpec(ABC):
    """How a picture becomes `pixel_values`; every field is plain JSON.

    All kinds: resize with Pillow's filter `resample`, times `rescale_factor`, minus `mean`, divided by `std`,
    the last two behind their switches. A kind is a subclass that adds its own fields, checks and work
    (`clip`, `qwen`, `anyres`, `internvl`, `idefics3`, `gemma4`, `pixtral`, `naflex`, `naflex_tiles`, `navit`,
    `navit_slices`); `kinds` reads and writes them.

    Raises `VtpError` for a spec that contradicts itself.
    """

    kind: ClassVar[str]

    do_convert_rgb: bool = True
    do_resize: bool = True
    resample: int = 3
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        self.check()

    def check(self) -> None:
        """Raise `VtpError` for a spec that no picture could go through; a kind checks its own fields too."""
        fits = is_int(self.resample) and 0 <= self.resample <= 5
        self.require(fits, f"resample must be 0 to 5, not {self.resample!r}")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            fits = len(numbers) == 3 and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
            self.require(fits, f"{name} must be three numbers, not {list(numbers)}")
        self.require(0 not in self.std, "std must not hold a zero")

    @property
    @abstractmethod
    def fixed_size(self) -> Size:
        """(H, W) of the pixels that the vision tower sees at once, of a tile where there are tiles.

        Raises `VtpError` where it depends on the picture.
        """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of `pixel_values`; raises `VtpError` where it depends on the picture."""

    @property
    def image_size(self) -> Size | None:
        """(H, W) of the image size that the bundle was made for; None: every picture goes through alike."""
        return None

    @property
    def views(self) -> int:
        """How many tiles `pixel_values` holds; 1 where the picture is seen in one piece."""
        return 1

    @property
    def view_grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of patches of every view, for kinds that hand views of unlike shapes over as
        patches, one view after another; else empty."""
        return ()

    @property
    def view_tokens(self) -> tuple[int, ...]:
        """Visual tokens of every view, for the same kinds; else empty: all views have equally many."""
        return ()

    @property
    def frames(self) -> int | None:
        """How many frames of a video the bundle looks at; None: it looks at pictures."""
        return None

    @abstractmethod
    def pixels(self, image: Image.Image) -> np.ndarray:
        """The `pixel_values` of one RGB picture: float32, of `shape`."""

    @abstractmethod
    def boxes(self, width: int, height: int) -> tuple[Box, ...]:
        """Where each tile of `pixel_values` lies in a source picture, in the order of the tiles."""

    def require(self, condition: bool, message: str) -> None:
        """Raise `VtpError` unless `condition`."""
        if not condition:
            raise VtpError(f"image preprocessing: {message}")

    def require_lengths(self, *names: str) -> None:
        """Raise `VtpError` unless each of these fields is unset or a whole number of 1 to 65,536."""
        for name in names:
            length = getattr(self, name)
            fits = length is None or (is_int(length) and 1 <= length <= LONGEST_EDGE)
            self.require(fits, f"{name} must be 1 to {LONGEST_EDGE}, not {length!r}")


def is_int(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a whole number; True is not."""
    return isinstance(value, int) and not isinstance(value, bool)
