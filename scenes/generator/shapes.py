"""Outlines of the coloured shapes, as anti-aliased masks.

Every outline is a function of the unit square (u to the right, v downwards, both in -1..1) whose value is
positive inside and falls by about one per unit of distance, so that one pixel of anti-aliasing is a clip.
"""

from collections.abc import Callable

import numpy as np

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.9 - np.hypot(u, v)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.8 - np.maximum(abs(u), abs(v))


def _diamond(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (1.05 - abs(u) - abs(v)) / np.sqrt(2)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    side = np.sqrt(3) / 2 * abs(u) - 0.5 * (v - 0.15)
    return 0.55 - np.maximum(side, v - 0.15)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    turn = np.pi / 5
    angle = np.arctan2(u, -v)
    folded = abs((angle + turn) % (2 * turn) - turn)
    radius = np.hypot(u, v)
    x, y = radius * np.cos(folded), radius * np.sin(folded)
    tip, notch = np.array([1.05, 0.0]), 0.46 * np.array([np.cos(turn), np.sin(turn)])
    edge = (notch - tip) / np.linalg.norm(notch - tip)
    return -(edge[1] * (x - tip[0]) - edge[0] * (y - tip[1]))


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    upright = np.minimum(0.3 - abs(u), 0.95 - abs(v))
    return np.maximum(upright, np.minimum(0.95 - abs(u), 0.3 - abs(v)))


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.2 - abs(np.hypot(u, v) - 0.73)


def _moon(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(0.95 - np.hypot(u, v), np.hypot(u - 0.5, v) - 0.72)


OUTLINES: dict[str, Field] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "diamond": _diamond,
    "moon": _moon,
}


def coverage(shape: str, x: float, y: float, radius: float, turn: float) -> tuple[np.ndarray, int, int]:
    """Anti-aliased mask of one shape.

    `x`, `y` and `radius` are in pixels, `turn` in radians. Returns the mask float32 [h, w] in 0..1 and the
    row and column of its first pixel in the picture.
    """
    reach = int(np.ceil(radius * 1.1)) + 1
    top, left = int(y) - reach, int(x) - reach
    axis = np.arange(2 * reach + 1, dtype=np.float32) + 0.5
    across, down = (axis + left - x) / radius, (axis + top - y) / radius
    u = np.cos(turn) * across[None, :] + np.sin(turn) * down[:, None]
    v = np.cos(turn) * down[:, None] - np.sin(turn) * across[None, :]
    return np.clip(OUTLINES[shape](u, v) * radius + 0.5, 0, 1).astype(np.float32), top, left
