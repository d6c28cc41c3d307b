"""Where the kept visual tokens lie in each picture, for clients that draw them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.preprocess import source_box


def kept_places(
    manifest: Manifest, sizes: Sequence[tuple[int, int]], kept: Sequence[Any]
) -> list[dict[str, Any] | None]:
    """One entry for each picture: its grid of tokens, and which of them were kept.

    sizes   (width, height) of the pictures as they were asked about
    kept    `Result.kept`: indices, or a list of them for each of several pictures

    An entry has `grid`, [rows, columns] of the model's visual tokens; `box`, [left, top, right, bottom] of
    the model's input in shares of the picture, which may lie beyond it; and `kept`, indices row by row. None
    for a model that sees a picture in several tiles, or a video: its tokens form no one grid.
    """
    spec, grid = manifest.image, manifest.visual.grid
    if spec.views > 1 or spec.frames is not None:
        return [None for _ in sizes]
    each = [kept] if len(sizes) == 1 else kept
    return [_place(source_box(spec, *size), size, grid, own) for size, own in zip(sizes, each, strict=True)]


def _place(box: Any, size: tuple[int, int], grid: Sequence[int], kept: Sequence[int]) -> dict[str, Any]:
    width, height = size
    shares = (box.left / width, box.top / height, box.right / width, box.bottom / height)
    return {
        "grid": [int(grid[0]), int(grid[1])],
        "box": [round(share, 12) for share in shares],
        "kept": [int(index) for index in kept],
    }
