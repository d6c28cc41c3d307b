"""How many tokens to keep, as the command line says it."""

from __future__ import annotations

import math

from vtp.engines import UsageError
from vtp.runtime.commands.console import whole_number

_ALLOWED = "a whole number, a list such as 32,64,128, or a range such as 32:128:32"


def parse_keep(text: str) -> list[int]:
    """Read "64", "32,64", "32:128:32" (end included) or a mix; ascending, without repeats.

    Raises UsageError for anything else; the range of allowed counts is checked by `check_keep`.
    """
    counts: set[int] = set()
    for part in text.split(","):
        numbers = [_number(piece, text) for piece in part.split(":")]
        if len(numbers) == 1:
            counts.add(numbers[0])
        elif len(numbers) == 3:
            counts.update(_span(text, *numbers))
        else:
            raise UsageError(f"keep-tokens '{text}' is not {_ALLOWED}")
    return sorted(counts)


def keep_for_ratio(ratio: float, count: int) -> int:
    """K for a prune-ratio R (the fraction dropped) of N = `count` tokens: max(1, floor(N (1 - R) + 1e-6))."""
    if not (math.isfinite(ratio) and 0.0 <= ratio <= 1.0):
        raise UsageError(f"prune-ratio {ratio:g} is outside 0 to 1, the fraction of visual tokens to drop")
    return max(1, math.floor(count * (1.0 - ratio) + 1e-6))


def check_keep(counts: list[int], count: int) -> list[int]:
    """Return `counts` if every one is 1 to N = `count`; UsageError otherwise."""
    for keep in counts:
        if keep > count:
            raise UsageError(
                f"keep-tokens {keep} exceeds the {count} visual tokens of this model; choose 1 to {count}"
            )
        if keep < 1:
            raise UsageError(f"keep-tokens {keep} keeps nothing; choose 1 to {count}")
    return counts


def _number(piece: str, text: str) -> int:
    piece = piece.strip()
    digits = piece[1:] if piece.startswith(("-", "+")) else piece
    if not (digits.isascii() and digits.isdecimal()):
        raise UsageError(f"keep-tokens '{text}' is not {_ALLOWED}")
    return whole_number("keep-tokens", piece.removeprefix("+"))


def _span(text: str, first: int, last: int, step: int) -> range:
    if step < 1 or last < first:
        raise UsageError(f"keep-tokens '{text}': a range is FIRST:LAST:STEP with FIRST <= LAST and STEP >= 1")
    if (last - first) // step > 4096:
        raise UsageError(f"keep-tokens '{text}' names more than 4096 counts; take a larger step")
    return range(first, last + 1, step)
