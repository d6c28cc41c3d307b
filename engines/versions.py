"""Versions: of installed distributions, and as numbers that can be compared."""

from __future__ import annotations

import re
from importlib import import_module, metadata


def own_version() -> str:
    """The version of vtp itself, which its import root says, installed or not."""
    return str(import_module("vtp").__version__)


def version_numbers(version: str) -> tuple[int, ...]:
    """A version as numbers, so that 10.13 is newer than 10.3."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def installed_version(distribution: str, absent: str = "") -> str:
    """The version of an installed distribution; `absent` if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return absent
