"""What this vtp serves: the methods and the families. Read without torch, from listed.json."""

from __future__ import annotations

from typing import Any

from vtp.export.listed import read_listed

__all__ = ["rows"]


def rows(kind: str) -> list[dict[str, Any]]:
    """The rows of "methods" or "families": as they were listed, or else read from the classes."""
    listed = read_listed()
    if listed is None:
        from vtp.export import declared

        listed = declared.listed()
    found: list[dict[str, Any]] = listed[kind]
    return found
