"""What one rendering of a stranger's chat template may cost: a budget of units, and the sizes of values.

A unit is about a byte made or a nanosecond or ten spent, so that a whole budget is a second or two and some
hundred megabytes at most. Knows nothing about Jinja's syntax.
"""

from __future__ import annotations

import threading
import time
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sized, ValuesView
from contextlib import contextmanager
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

UNITS = 2**27  # of one rendering: real templates take some thousand for each turn, and about 10 a character
SECONDS = 20.0  # a slow machine's last resort; the units end long before on any other
CALL = 250  # units of a call
ELEMENT = 128  # units of an element of a container, which is an object of its own
BITS = 4096  # of an integer
WORDS = 2**14  # characters that go through what is slower than linear

_LOOK = 2**20  # units between two looks at the clock
_SCALARS = (int, float, bool, type(None))
_HOLDERS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class TemplateLimit(SecurityError):
    """The template asks for more than any prompt needs."""


class Budget:
    """What is left of one rendering's units and time."""

    def __init__(self, units: int, seconds: float = SECONDS) -> None:
        self._left = units
        self._look = units
        self._end = time.monotonic() + seconds

    def charge(self, units: int) -> None:
        """Take `units`; raises `TemplateLimit` where none are left."""
        self._left -= units
        if self._left < 0:
            raise TemplateLimit(f"it takes more work than any prompt needs (limit: {UNITS} units)")
        if self._look - self._left > _LOOK:
            self._look = self._left
            if time.monotonic() > self._end:
                raise TemplateLimit(f"it takes longer than {SECONDS:g} s")


class _Now(threading.local):
    budget: Budget | None = None


_NOW = _Now()


def budget() -> Budget:
    """That of the rendering under way in this thread."""
    if _NOW.budget is None:
        raise TemplateLimit("no rendering is under way")
    return _NOW.budget


@contextmanager
def limited() -> Iterator[None]:
    """A budget for what is rendered or compiled inside."""
    before, _NOW.budget = _NOW.budget, Budget(UNITS)
    try:
        yield
    finally:
        _NOW.budget = before


def charge(units: int) -> bool:
    """Take units of this thread's budget; always true, so that it may stand in a condition."""
    budget().charge(units)
    return True


def text_units(text: str) -> int:
    """Units of a text: its bytes in memory, at most."""
    return len(text) if text.isascii() else 4 * len(text)


def shallow(value: Any) -> int:
    """Units of going over a value once, without what its elements hold."""
    if isinstance(value, str):
        return text_units(value)
    if isinstance(value, bytes):
        return len(value)
    return ELEMENT * len(value) if isinstance(value, Sized) else 1


def deep(value: Any) -> int:
    """Charge for all that a value holds, as often as it is reached; returns the units.

    Comparing, printing or hashing reaches the same list in a list twice, so that small values may be
    exponentially large; the walk ends with the budget.
    """
    kind = type(value)
    if kind is str:
        units = text_units(value)
        charge(units)
        return units
    if kind in _SCALARS and not (kind is int and value.bit_length() > BITS):
        return 1
    return _walk(value)


def _walk(value: Any) -> int:
    now, total, pending = budget(), 0, [value]
    while pending:
        units, inside = _opened(pending.pop())
        now.charge(units)
        total += units
        pending += inside
    return total


def _opened(value: Any) -> tuple[int, list[Any]]:
    """Units of one value, and the values that it holds."""
    if isinstance(value, str | bytes):
        return shallow(value), []
    if isinstance(value, int):
        return check_bits(value), []
    if isinstance(value, range):
        return len(value), []
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    inside: list[Any] = []
    if isinstance(value, Mapping):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, _HOLDERS):
        inside = list(value)
    return ELEMENT * (1 + len(inside)), inside


def check_bits(number: int) -> int:
    """Units of an integer; raises `TemplateLimit` for one that is longer than any count."""
    if number.bit_length() > BITS:
        raise TemplateLimit(f"it makes an integer of {number.bit_length()} bits (limit: {BITS})")
    return 1


def counted(value: Any) -> Any:
    """Charge for a value that was just made; an iterator is charged as it goes."""
    if isinstance(value, int):
        check_bits(value)
    elif isinstance(value, Iterator) and not isinstance(value, Sized):
        return _each(value)
    else:
        charge(shallow(value))
    return value


def _each(values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        charge(ELEMENT)
        yield value
