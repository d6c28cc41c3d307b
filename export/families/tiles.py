"""A tile of a picture, as families that cut pictures say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

TILED = MappingProxyType({"grid": "its tokens lie in several tiles"})  # see `Family.lacks`
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
    return unlike_tiles([grid] * count)


def unlike_tiles(grids: Sequence[tuple[int, int]]) -> list[Tile]:
    """Whole tiles of these (rows, columns) that follow one another; none for a single one."""
    ends = list(accumulate(high * wide for high, wide in grids))
    starts = [0, *ends[:-1]]
    tiles = [Tile(range(*edges), grid) for *edges, grid in zip(starts, ends, grids, strict=True)]
    return tiles if len(tiles) > 1 else []
