"""The cache of one decoder graph: buffers that stay, and how much of them is filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

import numpy as np

from vtp.engines import Engine, Held, Value, VtpError
from vtp.runtime.bundle.caches import KvInfo, StateTensors, kv_pairs
from vtp.runtime.stages.states import States


class KvCache:
    """One decoder stage's cache: a fixed buffer per layer, bound as past and as present.

    Nothing is copied or reallocated between steps; of every row, `lengths` int32 [B] tokens of `capacity`
    are filled, `length` of the longest. `resize` makes it one of another batch. Layers with a state have that
    in place of a buffer (`States`); such a cache begins anew or goes on, and is never cut back.

    engine  makes the buffers; others  further graphs of the same layers that read and write them, on engines
            that share its memory
    """

    feeds: dict[str, Value]
    into: dict[str, Value]
    lengths: np.ndarray
    states: States
    _buffers: dict[str, Value]
    _bindings: dict[Engine, Held]

    def __init__(
        self,
        engine: Engine,
        info: KvInfo,
        batch: int = 1,
        states: Sequence[StateTensors] = (),
        others: Sequence[Engine] = (),
    ) -> None:
        if info.lengths != "seqlens_k":
            raise VtpError(
                f"the cache convention '{info.lengths}' is unknown to this runtime; update vtp-edge"
            )
        self.capacity = info.capacity
        self._engine, self._others = engine, tuple(others)
        self._info, self._states = info, states
        self.resize(batch)

    def resize(self, batch: int) -> None:
        """Replace the buffers by empty ones for a batch of this number of rows."""
        self._bindings = {}  # before new buffers are made: two sets may be too much
        self.feeds, self.into, self._buffers = {}, {}, {}
        self.states = States(self._engine, (), 0)
        info, zeros = self._info, self._engine.zeros
        buffers = {name: zeros(self._shape(name, batch), info.dtype) for name in kv_pairs(info.layers)}
        self._use(buffers, States(self._engine, self._states, batch), np.zeros(batch, np.int32))

    def _shape(self, name: str, batch: int) -> tuple[int, ...]:
        """[B,heads,capacity,head_dim] of one buffer: layers may differ in both, and the graph tells."""
        _, heads, _, width = self._engine.inputs[name].shape
        return batch, int(heads), self.capacity, int(width)

    def rows(self, first: int, count: int) -> KvCache:
        """A cache of rows first .. first + count - 1 of this one, in the same memory and with their lengths.

        It serves until this one is resized. Only on engines that share rows.
        """
        part, share = copy(self), self._engine.rows
        buffers = {name: share(buffer, first, count) for name, buffer in self._buffers.items()}
        part._use(buffers, self.states.rows(first, count), self.lengths[first : first + count])
        return part

    def copy_row(self, source: int, target: int, tokens: int | None = None) -> int:
        """Have row `target` hold the first tokens of row `source` (None: all of them); returns the bytes."""
        count = int(self.lengths[source]) if tokens is None else tokens
        self._check_whole(count, int(self.lengths[source]))
        for buffer in self._buffers.values():
            self._engine.copy_row(buffer, source, target, count)
        self.lengths[target] = count
        return self.states.copy_row(source, target) + sum(
            count * buffer.shape[1] * buffer.shape[3] * buffer.dtype.itemsize
            for buffer in self._buffers.values()
        )

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        buffers = self._buffers.values()
        return self.states.bytes + sum(int(np.prod(one.shape)) * one.dtype.itemsize for one in buffers)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    def _use(self, buffers: dict[str, Value], states: States, lengths: np.ndarray) -> None:
        """Bind buffers [B,heads,capacity,head_dim] of which `lengths` int32 [B] tokens are filled."""
        self._buffers, self.states, self.lengths = buffers, states, lengths
        self._seqlens = self._engine.zeros(lengths.shape, "int32")
        self._total = self._engine.zeros((), "int32")
        own = {"seqlens_k": self._seqlens, "total_sequence_length": self._total}
        self.feeds = {**buffers, **states.feeds, **own}
        pairs = kv_pairs(self._info.layers)
        self.into = {**{pairs[name]: buffer for name, buffer in buffers.items()}, **states.into}
        self._bindings = {one: self._hold(one) for one in (self._engine, *self._others)}

    def _hold(self, engine: Engine) -> Held:
        """One of its engines with the buffers bound, which another engine may have made."""
        own = {id(value): engine.adopt(value) for value in self.feeds.values()}
        feeds, into = (
            {name: own[id(value)] for name, value in bound.items()} for bound in (self.feeds, self.into)
        )
        return engine.hold(feeds, into)

    def run(self, engine: Engine, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run one of its engines on the cache, with what else it reads; `advance` comes first."""
        return self._bindings[engine].run(feeds)

    def reset(self) -> None:
        """Forget every token; the buffers stay as they are, for lengths bound what is read."""
        self.keep_first(0)

    def keep_first(self, tokens: int) -> None:
        """Count only the first `tokens` of every row as filled."""
        self._check_whole(tokens, self.length)
        self.lengths[:] = tokens

    def advance(self, tokens: int | np.ndarray) -> None:
        """Make room for `tokens` more, or int32 [B] for every row its own.

        A row with 0 stays as long as it is, and its next token takes the place of its last; a state takes it
        in, so that such a row is over. Raises VtpError past the capacity, before anything is written.
        """
        lengths = self.lengths + tokens
        longest = int(lengths.max())
        if longest > self.capacity:
            raise VtpError(
                f"{longest} tokens exceed this bundle's cache of {self.capacity}; "
                "shorten the prompt, or export with a larger --max-length"
            )
        self.lengths[:] = lengths
        self._seqlens.update(self.lengths - 1)
        self._total.update(np.array(longest, np.int32))

    def _check_whole(self, tokens: int, length: int) -> None:
        """VtpError for a beginning of `length` tokens, where states tell only of all of them or of none."""
        if self.states and tokens not in (0, length):
            raise VtpError(f"a state of {length} tokens cannot be cut back to {tokens}; read the prompt anew")
