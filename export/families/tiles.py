"""A tile of a picture, as families that cut pictures say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Why families that cut pictures do not serve tower stc.
UNREUSED_TILES = "a reference picture would be kept for every tile"


@dataclass(frozen=True)
class Tile:
    """The patches of one tile: their places among the P of the picture, in raster order, and their grid.

    grid  (rows, columns), whose product is the number of places
    """

    places: Sequence[int]
    grid: tuple[int, int]


def equal_tiles(count: int, grid: tuple[int, int]) -> list[Tile]:
    """`count` whole tiles that follow one another; none for a single one, which is the picture."""
    size = grid[0] * grid[1]
    return [Tile(range(n * size, (n + 1) * size), grid) for n in range(count)] if count > 1 else []
