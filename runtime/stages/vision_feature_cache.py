"""What the image stages gave for the pictures of earlier prompts, kept for a next prompt about them.

Off unless asked for: an answer's timings then mean what they say, and it depends on nothing that was asked
before.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vtp.engines import Value

StageKey = tuple[str, "int | None"]  # file, keep-count
# What image stages gave for one picture: stage -> pipeline name -> value.
Features = dict[StageKey, dict[str, Value]]
Put = Callable[[np.ndarray], Value]


class VisionFeatureCache:
    """What the image stages gave for the pictures of the last `most` prompts; those unused for longest go
    first. Pictures are told apart by a hash of their pixel_values, in which the preprocessing is contained.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._prompts: OrderedDict[tuple[bytes, ...], None] = OrderedDict()
        self._features: dict[bytes, Features] = {}

    def find(self, pictures: Sequence[np.ndarray]) -> list[Features]:
        """An entry for each picture of one prompt, to be read and added to."""
        names = tuple(digest(picture) for picture in pictures)
        self._prompts[names] = None
        self._prompts.move_to_end(names)
        if len(self._prompts) > self._most:
            self._prompts.popitem(last=False)
        wanted = {name for prompt in self._prompts for name in prompt}
        self._features = {name: self._features.get(name, {}) for name in wanted}
        return [self._features[name] for name in names]

    def clear(self) -> None:
        """Forget every picture."""
        self._prompts.clear()
        self._features.clear()

    @property
    def bytes(self) -> int:
        """Memory that the kept outputs take."""
        outputs = [outputs for one in self._features.values() for outputs in one.values()]
        kept = {id(value): value for values in outputs for value in values.values()}
        return sum(int(np.prod(value.shape)) * value.dtype.itemsize for value in kept.values())


def digest(picture: np.ndarray) -> bytes:
    """By which pixel_values are told apart."""
    found = hashlib.sha256(repr(picture.shape).encode())
    found.update(np.ascontiguousarray(picture).data)
    return found.digest()


def recall(pictures: Sequence[Features], stage: StageKey, put: Put) -> dict[str, Value] | None:
    """What a stage gave for these pictures, one after the other; None unless all of them are known."""
    known = [one[stage] for one in pictures if stage in one]
    if len(known) < len(pictures):
        return None
    if len(known) == 1:
        return known[0]
    return {name: put(np.concatenate([one[name].numpy() for one in known])) for name in known[0]}


def store(pictures: Sequence[Features], stage: StageKey, outputs: Mapping[str, Value], put: Put) -> None:
    """Keep what a stage gave for these pictures: the rows of each of them with its own entry."""
    if len(pictures) == 1:
        pictures[0][stage] = dict(outputs)
        return
    rows = {name: rows_of(value, len(pictures)) for name, value in outputs.items()}
    for place, one in enumerate(pictures):
        one[stage] = {name: put(parts[place]) for name, parts in rows.items()}


def rows_of(value: Value, pictures: int) -> list[np.ndarray]:
    """An output of an image stage cut into those of its pictures, which have equally many rows."""
    return [np.ascontiguousarray(part) for part in np.split(value.numpy(), pictures)]
