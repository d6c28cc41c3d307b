"""How large a regular expression of a schema may be: counted repetitions multiply."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vtp.engines.errors import quoted_argument
from vtp.runtime.constrained.errors import refused

_LENGTH = 512  # characters
_WEIGHT = 10**4  # characters, once every repetition is written out
_COUNTED = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def check_pattern(pattern: str) -> None:
    """Raises FormatError for one that is too long, or too long when its repetitions are written out."""
    if len(pattern) > _LENGTH:
        raise refused(f"a pattern has {len(pattern)} characters; give at most {_LENGTH}")
    if weight(pattern) > _WEIGHT:
        raise refused(f"the pattern {quoted_argument(pattern)} repeats more than {_WEIGHT} characters")
    for letters in _negated(pattern):
        if any(_excludes(letters, sign) for sign in ('"', "\\")):
            # llguidance 1.9 lets their escapes through: JSON's text has \" where the value has ".
            raise refused(
                f"{quoted_argument(letters)} in a pattern excludes a quotation mark or a backslash, which is "
                "not served; name the characters that may come"
            )


def _negated(pattern: str) -> Iterator[str]:
    """The classes of characters in a pattern that say which must not come."""
    place = 0
    while place < len(pattern):
        end = _atom_end(pattern, place)
        if pattern.startswith("[^", place):
            yield pattern[place:end]
        place = end


def _excludes(letters: str, sign: str) -> bool:
    try:
        return re.fullmatch(letters, sign) is None
    except (re.error, OverflowError):  # one that Python does not know
        return re.escape(sign) in letters


def weight(pattern: str) -> int:
    """Characters of a pattern when every counted repetition is written out; groups are multiplied whole."""
    sums, last, place = [0], 0, 0  # of each open group so far; of what a repetition would repeat
    while place < len(pattern):
        letter = pattern[place]
        if letter == "(":
            sums[-1] += last
            sums.append(0)
            last, place = 0, place + 1
        elif letter == ")" and len(sums) > 1:
            last, place = sums.pop() + last, place + 1
        elif counted := _COUNTED.match(pattern, place):
            last *= max(1, *(int(number) for number in counted.groups() if number))
            place = counted.end()
        else:
            sums[-1] += last
            last, place = 1, _atom_end(pattern, place)
    return sum(sums) + last


def _atom_end(pattern: str, place: int) -> int:
    if pattern[place] == "[" and (found := _CLASS.match(pattern, place)):
        return found.end()
    return place + (2 if pattern[place] == "\\" else 1)
