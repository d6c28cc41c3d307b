"""A growing pool of pictures whose frozen tower features stay in memory, so that the decoder never waits."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionModel

from vtp.scenes.generator.pictures import PATCH, Picture, draw, training_seed
from vtp.scenes.training.mixed import half_precision
from vtp.scenes.training.tower import objects_for, preprocess, tower_forward


@dataclass(frozen=True)
class Encoded:
    """A picture without its pixels, and its tower features bfloat16 [N, C].

    Things stand where they do in the tower's grid, also if the picture is a window into it.
    """

    picture: Picture
    features: Tensor


class Pool:
    """Encoded training pictures by size and number of things; the oldest make room for new ones.

    With `reads`, every picture holds one sign, and small ones are windows into the tower's grid.
    """

    def __init__(self, tower: CLIPVisionModel, first: int, keep: int = 6000, reads: bool = False) -> None:
        self.tower, self.next, self.keep, self.reads = tower, first, keep, reads
        config: Any = tower.config
        self.side: int = config.image_size // config.patch_size
        self.entries: dict[tuple[int, int, int], list[Encoded]] = {}

    def sample(
        self,
        size: int,
        objects: tuple[int, int],
        number: int,
        fresh: int,
        rng: np.random.Generator,
        power: float = 1.2,
    ) -> list[Encoded]:
        """`number` pictures, of which `fresh` are new; all of them while the pool is small."""
        low, high = objects_for(size, objects, power)
        entries = self.entries.setdefault((size, low, high), [])
        fresh = number if len(entries) < 16 * number else fresh
        entries += self._encode(size, (low, high), fresh)
        del entries[: -self.keep]
        chosen: Iterable[int] = (
            rng.choice(len(entries) - fresh, number - fresh, replace=False) if number > fresh else []
        )
        return [entries[i] for i in chosen] + entries[len(entries) - fresh :]

    @torch.no_grad()
    def _encode(self, size: int, objects: tuple[int, int], number: int) -> list[Encoded]:
        if number == 0:
            return []
        pictures = [self._draw(size, objects) for _ in range(number)]
        span = self.side - size // PATCH + 1
        rng = np.random.default_rng([self.next, size])
        corners = torch.from_numpy(rng.integers(0, span, (number, 2))) if self.reads else None
        with half_precision():
            images = preprocess(np.stack([p.pixels for p in pictures]))
            features, _ = tower_forward(self.tower, images, corners)
        moved = [(0, 0)] * number if corners is None else corners.tolist()
        light = [
            _light(p, corner, self.side if self.reads else 0)
            for p, corner in zip(pictures, moved, strict=True)
        ]
        return [Encoded(p, f) for p, f in zip(light, features.bfloat16(), strict=True)]

    def _draw(self, size: int, objects: tuple[int, int]) -> Picture:
        """The next training picture; with `reads`, the next that had room for its sign."""
        signs = (1, 1) if self.reads else (0, 0)
        while True:
            picture = draw(training_seed(self.next), size, objects, signs)
            self.next += 1
            if len(picture.signs) == signs[0]:
                return picture


def _light(picture: Picture, corner: tuple[int, int], side: int) -> Picture:
    """The picture without its pixels; as a window at `corner` of `side` patches, if `side` is given."""
    row, col = corner
    size = side * PATCH or picture.owner.shape[0]
    things = tuple(replace(t, x=t.x + PATCH * col, y=t.y + PATCH * row) for t in picture.things)
    nothing, frame = np.empty((0, 0, 3), np.uint8), np.broadcast_to(np.uint8(0), (size, size))
    return Picture(nothing, frame, things, picture.signs)
