"""What this vtp serves, as tables: the methods and the families. Shown without torch, from listed.json."""

from __future__ import annotations

import json
from typing import Any

from vtp.export.listed import read_listed
from vtp.runtime.commands.tables import markdown_table, table

__all__ = ["render", "rows"]


def rows(kind: str) -> list[dict[str, Any]]:
    """The rows of "methods" or "families": as they were listed, or else read from the classes."""
    listed = read_listed()
    if listed is None:
        from vtp.export import declared

        listed = declared.listed()
    found: list[dict[str, Any]] = listed[kind]
    return found


def render(rows: list[dict[str, Any]], form: str) -> str:
    """Rows as "json", "markdown" or "text"."""
    if form == "json":
        return json.dumps(rows, indent=1)
    header = list(rows[0])
    cells = [[_cell(value) for value in row.values()] for row in rows]
    if form == "text":
        return table(header, cells)
    return markdown_table(header, cells)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={default}" for key, default in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return str(value) or "-"
