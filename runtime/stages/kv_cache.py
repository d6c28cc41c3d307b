"""The KV cache of one decoder graph: buffers that stay, and how much of them is filled."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import numpy as np

from vtp.engines import Engine, Held, Value, VtpError
from vtp.runtime.bundle.manifest import KvInfo


class KvCache:
    """One decoder stage's cache: a fixed buffer per layer, bound as past and as present.

    Nothing is copied or reallocated between steps; of every row, `lengths` int32 [B] tokens of `capacity`
    are filled, `length` of the longest. `resize` makes it one of another batch.
    """

    feeds: dict[str, Value]
    into: dict[str, Value]
    lengths: np.ndarray
    _buffers: dict[str, Value]
    _binding: Held | None

    def __init__(self, engine: Engine, info: KvInfo, batch: int = 1) -> None:
        if info.lengths != "seqlens_k":
            raise VtpError(
                f"the cache convention '{info.lengths}' is unknown to this runtime; update vtp-edge"
            )
        self.capacity = info.capacity
        self._engine = engine
        self._info = info
        self.resize(batch)

    def resize(self, batch: int) -> None:
        """Replace the buffers by empty ones for a batch of this number of rows."""
        self._binding = None  # before new buffers are made: two sets may be too much
        self.feeds, self.into, self._buffers = {}, {}, {}
        info, zeros = self._info, self._engine.zeros
        slots = [f"{layer}.{part}" for layer in info.layers for part in ("key", "value")]
        buffers = {slot: zeros(self._shape(slot, batch), info.dtype) for slot in slots}
        self._use(buffers, np.zeros(batch, np.int32))

    def _shape(self, slot: str, batch: int) -> tuple[int, ...]:
        """[B,heads,capacity,head_dim] of one buffer: layers may differ in both, and the graph tells."""
        _, heads, _, width = self._engine.inputs[f"past_key_values.{slot}"].shape
        return batch, int(heads), self.capacity, int(width)

    def rows(self, first: int, count: int) -> KvCache:
        """A cache of rows first .. first + count - 1 of this one, in the same memory and with their lengths.

        It serves until this one is resized. Only on engines that share rows.
        """
        part, share = copy(self), self._engine.rows
        buffers = {slot: share(buffer, first, count) for slot, buffer in self._buffers.items()}
        part._use(buffers, self.lengths[first : first + count])
        return part

    def copy_row(self, source: int, target: int, tokens: int | None = None) -> int:
        """Have row `target` hold the first tokens of row `source` (None: all of them); returns the bytes."""
        count = int(self.lengths[source]) if tokens is None else tokens
        for buffer in self._buffers.values():
            self._engine.copy_row(buffer, source, target, count)
        self.lengths[target] = count
        return sum(
            count * buffer.shape[1] * buffer.shape[3] * buffer.dtype.itemsize
            for buffer in self._buffers.values()
        )

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        return sum(int(np.prod(buffer.shape)) * buffer.dtype.itemsize for buffer in self._buffers.values())

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    def _use(self, buffers: dict[str, Value], lengths: np.ndarray) -> None:
        """Bind buffers [B,heads,capacity,head_dim] of which `lengths` int32 [B] tokens are filled."""
        self._buffers, self.lengths = buffers, lengths
        self._seqlens = self._engine.zeros(lengths.shape, "int32")
        self._total = self._engine.zeros((), "int32")
        self.feeds = {
            **{f"past_key_values.{slot}": buffer for slot, buffer in buffers.items()},
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
        }
        self.into = {f"present.{slot}": buffer for slot, buffer in buffers.items()}
        self._binding = self._engine.hold(self.feeds, self.into)

    def run(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run the engine on the cache, with what else it reads; `advance` comes first."""
        assert self._binding is not None  # since the last `resize`
        return self._binding.run(feeds)

    def reset(self) -> None:
        """Forget every token; the buffers stay as they are, for lengths bound what is read."""
        self.keep_first(0)

    def keep_first(self, tokens: int) -> None:
        """Count only the first `tokens` of every row as filled."""
        self.lengths[:] = tokens

    def advance(self, tokens: int | np.ndarray) -> None:
        """Make room for `tokens` more, or int32 [B] for every row its own.

        A row with 0 stays as long as it is, and its next token takes the place of its last. Raises VtpError
        past the capacity, before anything is written.
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
