"""A growing pool of pictures whose frozen tower features stay in memory, so that the decoder never waits."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionModel

from vtp.scenes.generator.pictures import Picture, draw, training_seed
from vtp.scenes.training.mixed import half_precision
from vtp.scenes.training.tower import objects_for, preprocess, tower_forward


@dataclass(frozen=True)
class Encoded:
    """A picture without its pixels, and its tower features bfloat16 [N, C]."""

    picture: Picture
    features: Tensor


class Pool:
    """Encoded training pictures by size and number of things; the oldest make room for new ones."""

    def __init__(self, tower: CLIPVisionModel, first: int, keep: int = 6000) -> None:
        self.tower, self.next, self.keep = tower, first, keep
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
        pictures = [draw(training_seed(self.next + i), size, objects) for i in range(number)]
        self.next += number
        with half_precision():
            features, _ = tower_forward(self.tower, preprocess(np.stack([p.pixels for p in pictures])))
        nothing = np.empty((0, 0, 3), np.uint8)
        frame = np.broadcast_to(np.uint8(0), (size, size))
        light = [Picture(nothing, frame, p.things) for p in pictures]
        return [Encoded(p, f) for p, f in zip(light, features.bfloat16(), strict=True)]
