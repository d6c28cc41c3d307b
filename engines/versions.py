"""Versions: of installed distributions, and as numbers that can be compared."""

from __future__ import annotations

import re
from importlib import metadata


def version_numbers(version: str) -> tuple[int, ...]:
    """A version as numbers, so that 10.13 is newer than 10.3."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def installed_version(distribution: str, absent: str = "") -> str:
    """The version of an installed distribution; `absent` if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return absent
