"""listed.json: what methods, reductions and families declare, in a file, for who must not wait for torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["LISTED", "files", "read_listed", "text_of"]

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


def _lines(values: list[Any]) -> str:
    return ",\n".join(f"  {json.dumps(value, ensure_ascii=False)}" for value in values)
