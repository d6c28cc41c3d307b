"""What each patch of a picture shows, from its true pixel masks: targets of the tower's throw-away heads."""

from dataclasses import dataclass

import numpy as np

from vtp.scenes.generator.pictures import COLORS, PATCH, SHAPES, Picture
from vtp.scenes.generator.signs import ALPHABET, Sign

IGNORE = -100
ENOUGH = 20  # pixels of a 14x14 patch from which on the patch shows the thing; below, it is not asked
READABLE = 0.4  # share of a character that a patch beside its centre must hold to be asked which it is
ON_PLATE = 0.25
SLOTS = ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2))  # length of the text and place in it
_COLORS = tuple(COLORS)


@dataclass(frozen=True)
class Labels:
    """Targets of one picture with G x G patches (P = G * G), raster order.

    shape, color: int64 [P], 0 for ground, IGNORE where a thing only just touches the patch. centre: float32
    [P, 2], x and y of the thing's centre in -1..1 (the patch's own on ground). anchor: float32 [P], 1 for
    the patch that holds a centre. summary: float32 [32], counts per shape and colour, then areas in patches.
    character, slot: int64 [P], 0 off the signs' text (one more than the index into `ALPHABET` and `SLOTS`
    on it), IGNORE where a character only just touches the patch. plate: float32 [P], the share of the patch
    that plates cover. ends: float32 [P, 2], where plates cover `ON_PLATE` of a patch or more, how far their
    left and right end are from its middle, in units of 3 patches (0 elsewhere).
    """

    shape: np.ndarray
    color: np.ndarray
    centre: np.ndarray
    anchor: np.ndarray
    summary: np.ndarray
    character: np.ndarray
    slot: np.ndarray
    ends: np.ndarray
    plate: np.ndarray


def patch_labels(picture: Picture, corner: tuple[int, int] = (0, 0), frame: int = 0) -> Labels:
    """The `Labels` of a picture, or of one that is a window into a larger one.

    `corner` is the window's first row and column in patches, `frame` the larger picture's side in patches:
    centres are given in its coordinates.
    """
    size = picture.owner.shape[0]
    grid, moved = size // PATCH, PATCH * np.array(corner[::-1])
    side = (frame or grid) * PATCH
    shape, color = np.zeros(grid * grid, np.int64), np.zeros(grid * grid, np.int64)
    anchor, centre = np.zeros(grid * grid, np.float32), _own_centres(grid, moved, side)
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
        centre[shown] = (np.array([thing.x, thing.y]) + moved) * 2 / side - 1
        anchor[int(thing.y) // PATCH * grid + int(thing.x) // PATCH] = 1
        summary[:, [s, len(SHAPES) + c]] += np.array([[1.0], [area.sum() / PATCH**2]], np.float32)
    return Labels(shape, color, centre, anchor, summary.ravel(), *_sign_labels(picture.signs, grid))


def shows_thing(picture: Picture) -> np.ndarray:
    """bool [P]: the patches that hold the centre of a thing (needs no mask)."""
    grid = picture.owner.shape[0] // PATCH
    shown = np.zeros(grid * grid, bool)
    for thing in picture.things:
        shown[int(thing.y) // PATCH * grid + int(thing.x) // PATCH] = True
    return shown


def _sign_labels(signs: tuple[Sign, ...], grid: int) -> tuple[np.ndarray, ...]:
    """`character`, `slot`, `ends` and `plate` of `Labels`."""
    character, slot = np.zeros(grid * grid, np.int64), np.zeros(grid * grid, np.int64)
    middles, ends = (np.arange(grid * grid) % grid + 0.5) * PATCH, np.zeros((grid * grid, 2), np.float32)
    best, plate = np.zeros(grid * grid), np.zeros(grid * grid)
    for sign in signs:
        mine = covered(sign.plate, grid)
        ends[mine >= ON_PLATE] = sign.plate[::2] - middles[mine >= ON_PLATE, None]
        plate += mine
        for place, letter in enumerate(sign.text):
            left, top, right, bottom = box = sign.character(place)
            share = covered(box, grid) * PATCH**2 / ((right - left) * (bottom - top))
            middle = int(top + bottom) // 2 // PATCH * grid + int(left + right) // 2 // PATCH
            character[(share > 0) & (best == 0)] = IGNORE
            slot[(share > 0) & (best == 0)] = IGNORE
            share[middle] += 1
            mine = (share >= READABLE) & (share > best)
            best[mine] = share[mine]
            character[mine] = ALPHABET.index(letter) + 1
            slot[mine] = SLOTS.index((len(sign.text), place)) + 1
    return character, slot, ends / (3 * PATCH), plate.astype(np.float32)


def covered(box: tuple[float, float, float, float], grid: int) -> np.ndarray:
    """The share of each patch [P] that a box (left, top, right, bottom in pixels) covers."""
    edges = np.arange(grid) * PATCH
    across, down = (
        np.clip(np.minimum(edges + PATCH, high) - np.maximum(edges, low), 0, None) / PATCH
        for low, high in ((box[0], box[2]), (box[1], box[3]))
    )
    return np.outer(down, across).ravel()


def _own_centres(grid: int, moved: np.ndarray, side: int) -> np.ndarray:
    axis = (np.arange(grid, dtype=np.float32) + 0.5) * PATCH
    own = np.stack([np.tile(axis, grid), np.repeat(axis, grid)], 1)
    return ((own + moved) * 2 / side - 1).astype(np.float32)
