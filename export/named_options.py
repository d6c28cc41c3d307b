"""NAME=VALUE on the command line: options of pruning methods and of tower reductions, read in one way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from vtp.engines.errors import UsageError, nearest, quoted
from vtp.engines.strict_json import LARGEST

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_WANTED = {bool: "true or false", int: "a whole number", float: "a finite number"}


def read_options(texts: Iterable[str], defaults: Mapping[str, Any], owner: str, flag: str) -> dict[str, Any]:
    """Each text's option, as a value of its default's type (int, float, bool or str).

    defaults  every option of the owner, by name
    owner     whose options they are ("method focal", "tower ipcv"), and
    flag      what gives them ("method-option"), for messages

    Raises UsageError for a text without "=", an unknown or repeated option, a value of another type, or a
    whole number that no manifest holds.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name:
            raise UsageError(f"{flag} {quoted(text)} is not of the form name=value")
        if name not in defaults:
            near, known = nearest(name, list(defaults)), ", ".join(defaults) or "none"
            raise UsageError(f"{owner} has no option {quoted(name)}{near}; its options: {known}")
        if name in options:
            raise UsageError(f"{owner}: {name} is given twice; give it once")
        options[name] = _value(value, defaults[name], f"{owner}: {name}")
    return options


def _value(text: str, default: Any, label: str) -> Any:
    kind = type(default)
    value = _converted(text, kind)
    if value is None or (kind is float and not math.isfinite(value)):
        raise UsageError(f"{label} is {quoted(text)}; give {_WANTED[kind]}, such as {default}")
    if kind is int and abs(value) > LARGEST:
        raise UsageError(f"{label} is {quoted(text)}; give at most {LARGEST}, such as {default}")
    return value


def _converted(text: str, kind: type) -> Any:
    """The text as a value of its kind, or None. Python's own extras (1_000, other digits) are not numbers."""
    if kind is str:
        return text
    if kind is bool:
        return _BOOLEANS.get(text.lower())
    try:
        return kind(text) if text.isascii() and "_" not in text else None
    except ValueError:
        return None
