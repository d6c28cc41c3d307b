"""The rows of one batch of caches, each a slot for a prompt of its own: read one by one, stepped together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtp.runtime.result import Timings
from vtp.runtime.stages.pieces import Pieces, Values
from vtp.runtime.stages.prefix_cache import SlotPrefix, StepPrefix
from vtp.runtime.stages.runner import StageRunner
from vtp.runtime.stages.stage import Check


class Slots:
    """`count` rows of a runner's caches, allocated at once.

    A prompt is read in place by a runner of its own row (`row`), and prompts in rows 0 .. n - 1 take their
    steps together (`first`). Nothing is copied but a row that is moved, and the beginning of a prompt that
    another row holds (prefix caching).

    copies, copied_bytes  how many rows were moved, or begun from another's, and what that took
    """

    def __init__(self, runner: StageRunner, count: int) -> None:
        """Take over `runner`, whose caches get `count` rows; more than one only where it shares rows."""
        runner.resize(count)
        self.count = count
        self.copies, self.copied_bytes = 0, 0
        self._runner = runner
        self._parts: dict[tuple[int, int], StageRunner] = {}
        self._prefixes: list[SlotPrefix] = []
        if runner.prefix is not None and count > 1:
            self._prefixes.extend(SlotPrefix(self._prefixes, self._copy) for _ in range(count))

    def encode(self, keep: int, pictures: Sequence[Any], timings: Timings, check: Check) -> Pieces[Values]:
        """The image stages of one prompt, in pieces; it has no row yet. See `StageRunner.encode`."""
        return self._runner.encode(keep, pictures, 1, timings, check)

    def row(self, place: int) -> StageRunner:
        """A runner of one row, for a prompt's stages."""
        if self.count == 1:
            return self._runner
        prefix = self._prefixes[place] if self._prefixes else None
        return self._part(place, 1, prefix)

    def first(self, count: int) -> StageRunner:
        """A runner of rows 0 .. count - 1, for their steps."""
        if self.count == 1:
            return self._runner
        prefix = StepPrefix(self._prefixes[:count]) if self._prefixes else None
        return self._part(-1, count, prefix)

    def move(self, source: int, target: int) -> None:
        """Copy a row to another, which takes its place."""
        self._copy(source, target)
        if self._prefixes:
            self._prefixes[target].follow(self._prefixes[source])

    @property
    def bytes(self) -> int:
        """Memory of all rows."""
        return sum(cache.bytes for cache in self._runner.caches.values())

    def close(self) -> None:
        """Give the runner back, with caches of one row."""
        self._parts.clear()
        self._runner.resize(1)

    def _part(self, place: int, count: int, prefix: SlotPrefix | StepPrefix | None) -> StageRunner:
        """A runner is kept for each row (`place`), and for each number of rows (place -1)."""
        if (place, count) not in self._parts:
            self._parts[place, count] = self._runner.on_rows(max(place, 0), count, prefix)
        return self._parts[place, count]

    def _copy(self, source: int, target: int, tokens: int | None = None) -> None:
        caches = self._runner.caches.values()
        self.copied_bytes += sum(cache.copy_row(source, target, tokens) for cache in caches)
        self.copies += 1
