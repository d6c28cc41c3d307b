"""The registry of tower reductions: one file each, its name the reduction's on the command line."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtp.engines.errors import UsageError, nearest, quoted
from vtp.export.towers.base import TowerReduction

NONE = "none"

_SUPPORT = {"base", "blocks", "registry"}
_PACKAGE = __name__.rpartition(".")[0]


def reduction_names() -> list[str]:
    """Every reduction: the files of this package, sorted."""
    files = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in files if name not in _SUPPORT)


def find_reduction(name: str) -> type[TowerReduction]:
    """The class of a reduction by its name; UsageError, with the nearest name, for one that is not known."""
    known = reduction_names()
    if name not in known:
        raise UsageError(
            f"unknown tower reduction {quoted(name)}{nearest(name, known)}; choose none, {', '.join(known)}"
        )
    found: type[TowerReduction] = importlib.import_module(f"{_PACKAGE}.{name}").REDUCTION
    return found


def parse_reduction(text: str, options: Sequence[str] = ()) -> TowerReduction | None:
    """What `--tower NAME[:VALUE]` and `--tower-option NAME=VALUE` mean; None for "none".

    VALUE is the reduction's main option. Raises UsageError for an unknown name or option, one that is given
    twice, and a value that is not of its kind or fits no tower.
    """
    name, colon, value = text.partition(":")
    if name == NONE:
        if colon or options:
            raise UsageError(f"tower none has no options; leave out {quoted(value or options[0])}")
        return None
    kind = find_reduction(name)
    pairs = [f"{kind.main}={value}"] if colon else []
    settings: dict[str, Any] = {}
    for pair in [*pairs, *options]:
        option, equals, given = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UsageError(f"tower-option {quoted(pair)} is not of the form name=value")
        if option not in kind.options:
            known = list(kind.options)
            raise UsageError(
                f"tower {name} has no option {quoted(option)}{nearest(option, known)}; its options: "
                f"{', '.join(known)}"
            )
        if option in settings:
            raise UsageError(f"tower {name}: {option} is given twice; give it once")
        settings[option] = _value(name, option, given, kind.options[option])
    return kind(settings)


def _value(name: str, option: str, text: str, default: Any) -> Any:
    kind = type(default)
    try:
        value = kind(text) if text.isascii() and "_" not in text else None
    except ValueError:
        value = None
    if value is None or not math.isfinite(value):
        wanted = "a whole number" if kind is int else "a finite number"
        raise UsageError(f"tower {name}: {option} is {quoted(text)}; give {wanted}, such as {default}")
    return value
