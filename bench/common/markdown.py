"""Markdown tables of reports."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int | None = None) -> str:
    """A Markdown table. The first `left` columns are aligned left, the rest right; None: all left."""
    words = len(header) if left is None else left
    marks = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, marks, *rows))


def milliseconds(ms: float) -> str:
    """A time as reports show it, without its unit: "1234", "12.3", "0.12"."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"
