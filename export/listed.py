"""listed.json: what methods, reductions and families declare, for who must not wait for torch; its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vtp.runtime.commands.tables import markdown_table, table

__all__ = ["LISTED", "files", "read_listed", "render", "text_of"]

LISTED = Path(__file__).with_name("listed.json")
_FOLDERS = ("pruners", "towers", "families")


def read_listed() -> dict[str, Any] | None:
    """What listed.json holds; None if a file was added or taken away since it was written."""
    listed: dict[str, Any] = json.loads(LISTED.read_text(encoding="utf-8"))
    return listed if listed["files"] == files() else None


def files() -> list[str]:
    """The modules of methods, reductions and families, by their paths in this package."""
    here = LISTED.parent
    found = (path for folder in _FOLDERS for path in (here / folder).rglob("*.py"))
    return sorted(path.relative_to(here).as_posix() for path in found)


def text_of(listed: dict[str, Any]) -> str:
    """The content of listed.json: a line for each row."""
    parts = (f' "{key}": [\n{_lines(value)}\n ]' for key, value in listed.items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


def render(rows: list[dict[str, Any]], form: str) -> str:
    """Rows as "json", "markdown" or "text"."""
    if form == "json":
        return json.dumps(rows, indent=1)
    header = list(rows[0])
    cells = [[_cell(value) for value in row.values()] for row in rows]
    if form == "text":
        return table(header, cells)
    return markdown_table(header, cells)


def _lines(values: list[Any]) -> str:
    return ",\n".join(f"  {json.dumps(value, ensure_ascii=False)}" for value in values)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={default}" for key, default in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return str(value) or "-"
