"""A limit to the memory that ONNX Runtime's CPU sessions compute with.

A few nodes of a stranger's graph (Expand, Tile, Range, a product of a column and a row) can ask for more than
there is, and the system would end the process once it is written. ONNX Runtime knows no limit for a session;
sessions can share one arena of the process, and that has one: what goes beyond it is an error of that run.
Weights lie outside of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from vtp.engines.ort.library import load_onnxruntime

_LEAST = 256 << 20  # bytes that are always given: a machine that says it is full may free something


class Room(Protocol):
    """So many bytes that can still be taken."""

    @property
    def bytes(self) -> int: ...


class _Arena:
    """The arena of this process; made once, since ONNX Runtime takes no other size later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = False
        self.made = False

    def make(self, room: Callable[[], Room | None]) -> None:
        with self._lock:
            if self._asked:
                return
            self._asked = True
            found = room()
            self.made = found is not None and _register(max(_LEAST, found.bytes))


_ARENA = _Arena()


def limit_tensors(room: Callable[[], Room | None]) -> None:
    """Hold CPU sessions that are opened from now on to the bytes of `room`, all of them together.

    The first call counts, and asks `room`; None is no limit.
    """
    _ARENA.make(room)


def tensors_limited() -> bool:
    """Whether CPU sessions are to use the arena with the limit."""
    return _ARENA.made


def _register(limit: int) -> bool:
    """Make the arena; False where this ONNX Runtime cannot, or someone else in the process made one."""
    ort = load_onnxruntime()
    try:
        place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator(place, ort.OrtArenaCfg({"max_mem": limit}))
    except Exception:  # its own types differ between versions
        return False
    return True
