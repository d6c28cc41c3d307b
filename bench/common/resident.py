"""Resident memory of this process, as the system counts it."""

from __future__ import annotations

import re
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident(status: Path = _STATUS) -> int:
    """Bytes resident now; 0 where the system does not tell."""
    return _read("VmRSS", status)


def peak_resident(status: Path = _STATUS) -> int:
    """The most bytes that were ever resident; 0 where the system does not tell."""
    return _read("VmHWM", status)


def _read(name: str, status: Path) -> int:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0
