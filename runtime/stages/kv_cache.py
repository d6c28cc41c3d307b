"""The KV cache of one decoder graph: buffers that stay, and how much of them is filled."""

from __future__ import annotations

from collections.abc import Mapping

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
        self.feeds, self.into = {}, {}
        info, zeros = self._info, self._engine.zeros
        shape = (batch, info.heads, info.capacity, info.head_dim)
        slots = [f"{layer}.{part}" for layer in info.layers for part in ("key", "value")]
        buffers = {slot: zeros(shape, info.dtype) for slot in slots}
        self._seqlens = zeros((batch,), "int32")
        self._total = zeros((), "int32")
        self.feeds = {
            **{f"past_key_values.{slot}": buffer for slot, buffer in buffers.items()},
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
        }
        self.into = {f"present.{slot}": buffer for slot, buffer in buffers.items()}
        self._binding = self._engine.hold(self.feeds, self.into)
        self.reset()

    def run(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run the engine on the cache, with what else it reads; `advance` comes first."""
        assert self._binding is not None  # since the last `resize`
        return self._binding.run(feeds)

    def reset(self) -> None:
        """Forget every token; the buffers stay as they are, for lengths bound what is read."""
        self.lengths = np.zeros(self._seqlens.shape, np.int32)
        self.length = 0

    def keep_first(self, tokens: int) -> None:
        """Count only the first `tokens` of every row as filled."""
        self.lengths, self.length = np.full_like(self.lengths, tokens), tokens

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
        self.lengths, self.length = lengths, longest
        self._seqlens.update(lengths - 1)
        self._total.update(np.array(longest, np.int32))
