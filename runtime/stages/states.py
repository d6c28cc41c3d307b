"""States of one decoder graph: what its layers carry from token to token in place of keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vtp.engines import Engine, Value
from vtp.runtime.bundle.caches import StateTensors


class States:
    """A buffer [B, *shape] for every layer with a state, bound as past and as present.

    Every run replaces them as a whole. They are never emptied: a run on an empty cache does not look at what
    they hold (see `StateTensors`), so that a slot which takes another prompt needs nothing done to it.
    """

    def __init__(self, engine: Engine, infos: Sequence[StateTensors], batch: int) -> None:
        self._engine = engine
        self._names = {name: to for info in infos for name, to in info.pairs.items()}
        self._buffers: Mapping[str, Value] = {
            name: engine.zeros((batch, *info.shape), info.dtype) for info in infos for name in info.pairs
        }

    def rows(self, first: int, count: int) -> States:
        """Those of rows first .. first + count - 1, in the same memory."""
        part = States(self._engine, (), 0)
        part._names = self._names
        part._buffers = {
            name: self._engine.rows(buffer, first, count) for name, buffer in self._buffers.items()
        }
        return part

    def copy_row(self, source: int, target: int) -> int:
        """Have row `target` hold what row `source` does; returns the bytes."""
        for buffer in self._buffers.values():
            self._engine.copy_row(buffer, source, target, buffer.shape[2])
        return sum(_bytes(buffer) // buffer.shape[0] for buffer in self._buffers.values())

    def __bool__(self) -> bool:
        return bool(self._buffers)

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        return sum(map(_bytes, self._buffers.values()))

    @property
    def feeds(self) -> dict[str, Value]:
        """By the names of the graph's inputs."""
        return dict(self._buffers)

    @property
    def into(self) -> dict[str, Value]:
        """By the names of the graph's outputs."""
        return {self._names[name]: buffer for name, buffer in self._buffers.items()}


def _bytes(buffer: Value) -> int:
    return int(np.prod(buffer.shape)) * buffer.dtype.itemsize
