"""The picture that shows which visual tokens were kept: their patches in colour, all else dimmed.

Of a video it is a sheet of its frames.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vtp.engines.disk.whole import whole_file
from vtp.engines.errors import UsageError, VtpError
from vtp.runtime.preprocess import ImageSpec, source_box

__all__ = ["check_one_view", "check_picture_path", "save_picture", "show_kept", "show_kept_frames"]

_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
_DROPPED = 0.38  # brightness of dropped patches, which also lose their colour
_UNSEEN = 0.2  # and of what lies outside the model's input
_OUTLINE = (255, 244, 214)
_OUTLINED_FROM = 6  # source pixels per patch; below that, an outline would hide the patch
_SHEET_EDGE = 480  # a frame on a sheet is at most so wide and so high
_SHEET_GAP = 6


def show_kept(
    image: Image.Image, spec: ImageSpec, grid: tuple[int, int], kept: Sequence[int] | np.ndarray
) -> Image.Image:
    """Return a copy of `image` in which only the `kept` patches keep their colours.

    image: the source picture, upright RGB. grid: (rows, columns) of the model's patches. kept: indices into
    them, row by row from 0. Patches are mapped back through the resizing and cropping of `spec`; what the
    model did not see is darker still. An index outside the grid is a `VtpError`, and so is a bundle that sees
    a picture in several tiles.
    """
    check_one_view(spec)
    kept_grid = _kept_grid(grid, kept)
    rows, columns = _patch_of_pixels(spec, grid, image.size)
    mask = kept_grid[rows[:, None], columns[None, :]]  # [H, W] bool
    seen = (rows < grid[0])[:, None] & (columns < grid[1])[None, :]
    picture = image.convert("RGB")
    gray = _flattened(picture)
    shown = ImageEnhance.Brightness(gray).enhance(_UNSEEN)
    shown.paste(ImageEnhance.Brightness(gray).enhance(_DROPPED), mask=_as_mask(seen))
    shown.paste(picture, mask=_as_mask(mask))
    if width := _outline_width(spec, grid, image.size):
        shown.paste(_OUTLINE, mask=_as_mask(mask & ~_shrunk(mask, width), 170))
    return shown


def show_kept_frames(
    frames: Sequence[Image.Image],
    spec: ImageSpec,
    grid: tuple[int, int],
    firsts: Sequence[int],
    kept: Sequence[int] | np.ndarray,
) -> Image.Image:
    """Return a sheet of a video's frames, row by row, each as `show_kept` shows a picture.

    grid: (rows, columns) of a frame's patches. kept: indices into the visual tokens of all frames, of which
    `firsts` are the first patches of each frame; tokens that are not patches are not shown.
    """
    indices = np.asarray(kept, dtype=np.int64)
    shown = []
    for frame, first in zip(frames, firsts, strict=True):
        own = indices[(indices >= first) & (indices < first + grid[0] * grid[1])] - first
        picture = show_kept(frame, spec, grid, own)
        picture.thumbnail((_SHEET_EDGE, _SHEET_EDGE))
        shown.append(picture)
    return _sheet(shown)


def _sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side, in about as many rows as columns."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = (max(edges) + _SHEET_GAP for edges in zip(*(one.size for one in pictures), strict=True))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width - _SHEET_GAP, rows * height - _SHEET_GAP))
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        sheet.paste(picture, (column * width, row * height))
    return sheet


def check_one_view(spec: ImageSpec) -> None:
    """Raise `VtpError` for a bundle that sees a picture in several tiles: its tokens form no one grid."""
    if spec.views > 1:
        raise VtpError(
            f"this bundle sees a picture in {spec.views} tiles, which cannot be shown yet; "
            "leave out --show-kept"
        )


def check_picture_path(path: str | os.PathLike[str], shown: Sequence[str | os.PathLike[str]] = ()) -> Path:
    """Return where a picture may be written, or raise `UsageError`: suffix, missing folder, rights.

    shown  the pictures asked about, which it must not take the place of
    """
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        given = f"'{target.suffix}'" if target.suffix else "no suffix"
        raise UsageError(
            f"cannot write a picture with {given} ('{target}'); choose one of {', '.join(_SUFFIXES)}"
        )
    if target.is_dir():
        raise UsageError(f"'{target}' is a directory; give the name of a picture file")
    if target.exists() and not target.is_file():
        raise UsageError(f"'{target}' is not a regular file; give the name of a picture file")
    if target.exists() and any(Path(one).exists() and target.samefile(one) for one in shown):
        raise UsageError(f"'{target}' is the picture that is asked about; choose another name")
    if not target.parent.is_dir():
        raise UsageError(f"the folder '{target.parent}' does not exist; make it first")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise UsageError(f"'{target}' cannot be written; choose a path that you can write to")
    return target


def save_picture(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write `image` in the format of the path's suffix, whole or not at all, after `check_picture_path`."""
    target, encoded = check_picture_path(path), io.BytesIO()
    with whole_file(target) as aside:
        try:
            # Not into the file: Pillow takes it for written when a full disk took a part of it.
            image.save(encoded, format=_SUFFIXES[target.suffix.lower()])
        except ValueError as error:
            raise VtpError(f"cannot write '{target}': {error}") from error
        aside.write_bytes(encoded.getbuffer())
    return target


def _kept_grid(grid: tuple[int, int], kept: Sequence[int] | np.ndarray) -> np.ndarray:
    """Bool [rows + 1, columns + 1]; the last row and column stand for pixels outside the model's input."""
    rows, columns = grid
    indices = np.asarray(kept, dtype=np.int64).reshape(-1)
    if indices.size and (indices.min() < 0 or indices.max() >= rows * columns):
        raise VtpError(
            f"kept indices {indices.min()} to {indices.max()} do not fit a grid of {rows}x{columns} patches; "
            f"they must be 0 to {rows * columns - 1}"
        )
    result = np.zeros((rows + 1, columns + 1), dtype=bool)
    result[indices // columns, indices % columns] = True
    return result


def _patch_of_pixels(
    spec: ImageSpec, grid: tuple[int, int], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The patch row of every pixel row, [H], and the patch column of every pixel column, [W]."""
    box = source_box(spec, *size)
    rows = _cells(size[1], box.top, box.bottom, grid[0])
    return rows, _cells(size[0], box.left, box.right, grid[1])


def _cells(length: int, start: float, end: float, count: int) -> np.ndarray:
    """Which of `count` equal cells from `start` to `end` holds each pixel's centre; `count` for none."""
    centres = np.arange(length) + 0.5
    cells = np.floor((centres - start) / (end - start) * count).astype(np.int64)
    return np.where((cells >= 0) & (cells < count), cells, count)


def _flattened(picture: Image.Image) -> Image.Image:
    """Gray, with a little contrast taken away so that bright ground does not compete."""
    return ImageEnhance.Contrast(ImageOps.grayscale(picture).convert("RGB")).enhance(0.8)


def _as_mask(where: np.ndarray, strength: int = 255) -> Image.Image:
    """A paste mask from bool [H, W]; strength 255 replaces, less blends."""
    return Image.fromarray(where.astype(np.uint8) * np.uint8(strength))


def _outline_width(spec: ImageSpec, grid: tuple[int, int], size: tuple[int, int]) -> int:
    """Line width in source pixels: a thirtieth of a patch, at least 1, none on patches too small for it."""
    box = source_box(spec, *size)
    patch = min((box.right - box.left) / grid[1], (box.bottom - box.top) / grid[0])
    return max(1, round(patch / 30)) if patch >= _OUTLINED_FROM else 0


def _shrunk(mask: np.ndarray, width: int) -> np.ndarray:
    """The mask without its outermost `width` pixels; the picture's own border counts as inside."""
    result = mask.copy()
    for axis in (0, 1):
        for step in (-width, width):
            moved = np.roll(mask, step, axis)
            border = [slice(None), slice(None)]
            border[axis] = slice(0, width) if step > 0 else slice(-width, None)
            moved[tuple(border)] = True
            result &= moved
    return result
