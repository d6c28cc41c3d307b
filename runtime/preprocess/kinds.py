"""The kinds of preprocessing, by name; a new recipe is one module and one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from vtp.runtime.preprocess import anyres, clip, idefics3, internvl, qwen
from vtp.runtime.preprocess.pixels import Box, Size

if TYPE_CHECKING:
    from vtp.runtime.preprocess.spec import ImageSpec


class Kind(NamedTuple):
    """What one kind can do.

    check   raises VtpError for a spec that no picture could go through; fields that all kinds share are
            checked already.
    fields  names of the spec's fields that belong to this kind and not to all.
    size    (H, W) of the pixels that the vision tower sees at once: of a tile, where there are tiles.
    shape   shape of `pixel_values`.
    pixels  the work itself.
    boxes   where each tile lies in a source picture of (width, height).
    """

    check: Callable[[ImageSpec], None]
    fields: tuple[str, ...]
    size: Callable[[ImageSpec], Size]
    shape: Callable[[ImageSpec], tuple[int, ...]]
    pixels: Callable[[Image.Image, ImageSpec], np.ndarray]
    boxes: Callable[[ImageSpec, int, int], tuple[Box, ...]]


KINDS: dict[str, Kind] = {
    name: Kind(module.check, module.FIELDS, module.size, module.shape, module.pixels, module.boxes)
    for name, module in (
        ("clip", clip),
        ("qwen", qwen),
        ("anyres", anyres),
        ("internvl", internvl),
        ("idefics3", idefics3),
    )
}
