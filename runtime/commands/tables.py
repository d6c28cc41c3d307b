"""Tables: for people, in columns that fold where the terminal is narrower than they are; and in Markdown."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from vtp.engines.errors import MESSAGE_LENGTH, shown

__all__ = ["markdown_row", "markdown_table", "table"]

_GAP = "  "
_NARROWEST = 8  # no column is folded to fewer characters


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Columns aligned: the first to the left, the others to the right when all their cells are numbers.

    width  characters of a line at most: the cells of the widest columns then take several lines. None: the
           terminal's; if the output is not a terminal, as many as the cells have
    """
    cells = [list(header), *[[shown(cell, MESSAGE_LENGTH) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    limit = _terminal_width() if width is None else width
    if limit is not None:
        widths = _narrowed(widths, limit)
    numeric = [
        column > 0 and all(_is_number(row[column]) for row in cells[1:]) for column in range(len(header))
    ]
    lines = [line for row in cells for line in _lines(row, widths, numeric)]
    heading = len(_lines(cells[0], widths, numeric))
    lines.insert(heading, _GAP.join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: int | None = None,
    *,
    align: str | None = None,
    tight: bool = False,
) -> str:
    """A Markdown table of cells that are Markdown already.

    left   columns, from the first, that are aligned left, the rest right; None: all left
    align  instead of `left`, how each column is aligned: "l" or "r", the last letter for all that remain
    tight  no spaces in the line below the header
    """
    words = len(header) if left is None else left
    letters = (align or "l" * words + "r").ljust(len(header), (align or "r")[-1])[: len(header)]
    marks = [{"l": "---", "r": "---:"}[letter] for letter in letters]
    below = f"|{'|'.join(marks)}|" if tight else markdown_row(marks)
    return "\n".join([markdown_row(header), below, *map(markdown_row, rows)])


def markdown_row(cells: Sequence[str]) -> str:
    """One line of it, for a study that prints its rows as it finds them."""
    return f"| {' | '.join(cells)} |"


def _lines(row: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> list[str]:
    """One row, on as many lines as its longest cell takes."""
    folded = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
    return [
        _GAP.join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(parts, widths, numeric, strict=True)
        ).rstrip()
        for parts in zip_longest(*folded, fillvalue="")
    ]


def _narrowed(widths: Sequence[int], limit: int) -> list[int]:
    """The widest columns made narrower, until a line fits or they are as narrow as they may be."""
    narrowed = list(widths)
    while sum(narrowed) + len(_GAP) * (len(narrowed) - 1) > limit and max(narrowed) > _NARROWEST:
        narrowed[narrowed.index(max(narrowed))] -= 1
    return narrowed


def _terminal_width() -> int | None:
    """Characters of a line of standard output; None: it is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None


def _is_number(cell: str) -> bool:
    return bool(cell) and cell[0] in "0123456789-"
