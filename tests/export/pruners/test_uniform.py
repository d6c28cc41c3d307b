"""Uniform: tokens spread over the grid."""

from __future__ import annotations

import numpy as np
import pytest

from .compared import REFERENCES


@pytest.mark.parametrize("grid", [(24, 24), (5, 7), (1, 9), (9, 1), (2, 31), (16, 12)])
def test_uniform_covers_the_grid_for_every_keep_count(grid):
    from vtp.export.pruners.uniform import spread

    count = grid[0] * grid[1]
    for keep in range(1, count + 1):
        kept = spread(grid, keep)
        assert kept == sorted(set(kept)) and len(kept) == keep
        assert kept[0] >= 0 and kept[-1] < count
        assert kept == REFERENCES["uniform"](grid, keep)[0]
    assert spread(grid, count) == list(range(count))


def test_uniform_is_well_spread():
    from vtp.export.pruners.uniform import spread

    for keep in (16, 32, 57, 64, 128, 192):
        kept = np.array([(place // 24, place % 24) for place in spread((24, 24), keep)])
        every = np.array([(y, x) for y in range(24) for x in range(24)])
        nearest = np.sqrt(((every[:, None] - kept[None]) ** 2).sum(-1)).min(1)
        assert nearest.max() <= 24 / np.sqrt(keep) + 0.5, (
            "no place is further than a cell away from a kept one"
        )
