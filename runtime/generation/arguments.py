"""Checks of the arguments of a generation."""

from __future__ import annotations

import math
import os
from typing import TypeGuard

import numpy as np

from vtp.engines.errors import UsageError, quoted_argument

__all__ = ["flag", "is_number", "is_penalty", "is_whole", "thread_count", "whole"]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, Python's or NumPy's; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, Python's or NumPy's; True and False are not."""
    if not is_whole(value) and not isinstance(value, float | np.floating):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def is_penalty(value: object) -> TypeGuard[float]:
    """Whether a repetition penalty is above 0 and finite in float32, which it is applied in."""
    return is_number(value) and _FLOAT32[0] <= float(value) <= _FLOAT32[1]


_FLOAT32 = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def whole(name: str, value: object, least: int = 1) -> int:
    """`value` as an int; UsageError unless it is an integer of at least `least`."""
    if not is_whole(value) or value < least:
        raise UsageError(f"{name} {quoted_argument(value)} is not a whole number of at least {least}")
    return int(value)


def flag(name: str, value: object) -> bool:
    """`value` as a bool; UsageError unless it is one: text such as "no" would count as true."""
    if not isinstance(value, bool | np.bool_):
        raise UsageError(f"{name} {quoted_argument(value)} is not a yes or no; give True or False")
    return bool(value)


def prompts_kept(name: str, value: object) -> int:
    """How many prompts a cache holds; UsageError unless it is a whole number, 0 for none."""
    if not is_whole(value) or value < 0:
        raise UsageError(f"{name} {quoted_argument(value)} is not a number of prompts; give 0 (off) or more")
    return int(value)


def thread_count(value: object) -> int | None:
    """CPU threads of one operator; None: as many as the engine takes by itself.

    Each thread of each graph takes memory and a place in the kernel's queue, so a number that no machine has
    use for is refused: UsageError beyond four for a core, or beyond 64 on small machines.
    """
    if value is None:
        return None
    count, most = whole("threads", value), max(64, 4 * (os.cpu_count() or 1))
    if count > most:
        raise UsageError(
            f"threads {quoted_argument(value)} is more than this machine has use for; choose 1 to {most}"
        )
    return count
