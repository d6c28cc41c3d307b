"""What each patch of a picture shows, from its true pixel masks: targets of the tower's throw-away heads."""

from dataclasses import dataclass

import numpy as np

from vtp.scenes.generator.pictures import COLORS, PATCH, SHAPES, Picture

IGNORE = -100
ENOUGH = 20  # pixels of a 14x14 patch from which on the patch shows the thing; below, it is not asked
_COLORS = tuple(COLORS)


@dataclass(frozen=True)
class Labels:
    """Targets of one picture with G x G patches (P = G * G), raster order.

    shape, color: int64 [P], 0 for ground, IGNORE where a thing only just touches the patch. centre: float32
    [P, 2], x and y of the thing's centre in -1..1 (the patch's own on ground). anchor: float32 [P], 1 for
    the patch that holds a centre. summary: float32 [32], counts per shape and colour, then areas in patches.
    """

    shape: np.ndarray
    color: np.ndarray
    centre: np.ndarray
    anchor: np.ndarray
    summary: np.ndarray


def patch_labels(picture: Picture) -> Labels:
    """The `Labels` of a picture."""
    size = picture.owner.shape[0]
    grid = size // PATCH
    shape, color = np.zeros(grid * grid, np.int64), np.zeros(grid * grid, np.int64)
    anchor, centre = np.zeros(grid * grid, np.float32), _own_centres(grid)
    summary = np.zeros((2, len(SHAPES) + len(_COLORS)), np.float32)
    rows, cols = np.nonzero(picture.owner)
    owners = picture.owner[rows, cols]
    for number, thing in enumerate(picture.things, 1):
        mine = owners == number
        area = np.bincount(rows[mine] // PATCH * grid + cols[mine] // PATCH, minlength=grid * grid)
        s, c = SHAPES.index(thing.shape), _COLORS.index(thing.color)
        shown = area >= ENOUGH
        shape[(area > 0) & ~shown & (shape == 0)] = IGNORE
        color[(area > 0) & ~shown & (color == 0)] = IGNORE
        shape[shown], color[shown] = s + 1, c + 1
        centre[shown] = np.array([thing.x, thing.y]) * 2 / size - 1
        anchor[int(thing.y) // PATCH * grid + int(thing.x) // PATCH] = 1
        summary[:, [s, len(SHAPES) + c]] += np.array([[1.0], [area.sum() / PATCH**2]], np.float32)
    return Labels(shape, color, centre, anchor, summary.ravel())


def shows_thing(picture: Picture) -> np.ndarray:
    """bool [P]: the patches that hold the centre of a thing (needs no mask)."""
    grid = picture.owner.shape[0] // PATCH
    shown = np.zeros(grid * grid, bool)
    for thing in picture.things:
        shown[int(thing.y) // PATCH * grid + int(thing.x) // PATCH] = True
    return shown


def _own_centres(grid: int) -> np.ndarray:
    axis = (np.arange(grid, dtype=np.float32) + 0.5) * 2 / grid - 1
    return np.stack([np.tile(axis, grid), np.repeat(axis, grid)], 1)
