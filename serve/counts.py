"""Counts in Prometheus' text format: a histogram, and one line of a metric."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts of values up to each bound, their number and sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """bounds: upper ones of the buckets, ascending."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: Labels) -> Iterator[str]:
        """As Prometheus wants them: each bucket holds the smaller ones."""
        *below, total = accumulate(self._counts)
        for bound, count in zip(self._bounds, below, strict=True):
            yield line(f"{name}_bucket", (*labels, ("le", f"{bound:g}")), count)
        yield line(f"{name}_bucket", (*labels, ("le", "+Inf")), total)
        yield line(f"{name}_sum", labels, self._sum)
        yield line(f"{name}_count", labels, total)


def head(name: str, kind: str, told: str) -> tuple[str, str]:
    """The two lines before a metric's values."""
    return f"# HELP {name} {told}", f"# TYPE {name} {kind}"


def line(name: str, labels: Labels, value: float) -> str:
    """One value of a metric."""
    text = ",".join(f'{label}="{_escaped(content)}"' for label, content in labels)
    return f"{name}{{{text}}} {value!r}" if text else f"{name} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
