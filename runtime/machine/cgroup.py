"""How much memory this process's control groups leave it (Linux, versions 1 and 2).

A limit may lie on any group above the process's own. What a group uses includes the page cache, which the
kernel gives back before anything is killed: that part is not counted as used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Kernels say "no limit" in version 1 by a number near 2^63.
_NO_LIMIT = 1 << 60
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))
_V1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def cgroup_left(root: Path = Path("/")) -> int | None:
    """Bytes that a process which starts now may take before a group's limit; None without a limit.

    0 is a group that is full. `root` stands in for "/" in tests.
    """
    left = [free for folder, names in _groups(root) if (free := _left(folder, *names)) is not None]
    return min(left, default=None)


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, tuple[str, ...]]]]:
    """The folders of this process's groups up to the root, with the names of the files in them."""
    mount = root / "sys/fs/cgroup"
    entries = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines()]
    entries = [entry for entry in entries if len(entry) == 3]
    paths = {"": "/", "memory": "/"}  # in a container the mount is the group itself
    paths |= {kind: path for _, kinds, path in entries for kind in kinds.split(",") if kind in paths}
    for folder in _upwards(mount, paths[""]):
        yield folder, _V2
    for folder in _upwards(mount / "memory", paths["memory"]):
        yield folder, _V1


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _left(folder: Path, limit_file: str, used_file: str, cached: tuple[str, ...]) -> int | None:
    limit = _read(folder / limit_file).strip()
    if not limit.isdecimal() or int(limit) >= _NO_LIMIT:
        return None
    used = _read(folder / used_file).strip()
    pairs = (line.split() for line in _read(folder / "memory.stat").splitlines())
    statistics = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
    given_back = sum(statistics.get(name, 0) for name in cached)
    taken = max(0, int(used if used.isdecimal() else 0) - given_back)
    return max(0, int(limit) - taken)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
