"""Tensors in pieces that fit: shards of a checkpoint, slices of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Name = TypeVar("Name")


def grouped(sizes: Mapping[Name, int], most: int) -> list[list[Name]]:
    """The names in order, cut where a group would exceed `most` bytes; one that is larger stands alone."""
    groups: list[list[Name]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups
