"""How much memory this process may still take before something stops it, and what that is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vtp.runtime.machine.cgroup import cgroup_left

# What a process may set a limit to, and what /proc/self/status says it takes of it.
_LIMITS = (("RLIMIT_AS", "VmSize", "ulimit -v"), ("RLIMIT_DATA", "VmData", "ulimit -d"))


@dataclass(frozen=True)
class Room:
    """Bytes that can still be taken, and which limit says so: "this machine's free memory and swap"."""

    bytes: int
    limit: str


def memory_room(root: Path = Path("/")) -> Room | None:
    """The tightest limit of this process's memory; None where the system tells of none.

    Swap counts as room, and so does the page cache: nothing is killed before both are used up. `root` stands
    in for "/" in tests.
    """
    rooms = [*_of_machine(root), *_of_process(root)]
    return min(rooms, key=lambda room: room.bytes, default=None)


def _of_machine(root: Path) -> Iterator[Room]:
    told = _kilobytes(root / "proc/meminfo", ("MemAvailable", "SwapFree"))
    swap = told.get("SwapFree", 0)
    if "MemAvailable" in told:
        yield Room(told["MemAvailable"] + swap, "this machine's free memory and swap")
    left = cgroup_left(root)
    if left is not None:
        yield Room(left + swap, "what its control group (container) leaves")


def _of_process(root: Path) -> Iterator[Room]:
    try:
        import resource
    except ImportError:  # Windows
        return
    taken = _kilobytes(root / "proc/self/status", [used for _, used, _ in _LIMITS])
    for name, used, command in _LIMITS:
        soft = resource.getrlimit(getattr(resource, name))[0]
        if soft != resource.RLIM_INFINITY and used in taken:
            yield Room(max(0, soft - taken[used]), f"what this process's limit ({command}) leaves")


def _kilobytes(path: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes by name, of a file with lines such as "VmSize:   1024 kB"."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found = {name: re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE) for name in names}
    return {name: int(match[1]) * 1024 for name, match in found.items() if match}
