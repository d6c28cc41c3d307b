"""The one exception that a user is meant to read, and how text from elsewhere is put into a message."""

from __future__ import annotations

import re
from itertools import islice

VALUE_LENGTH = 200  # characters of one value in a message
ARGUMENT_LENGTH = 60  # of an argument from Python
MESSAGE_LENGTH = 1000  # characters of a message
# What moves a terminal's cursor, ends a line, turns the direction of text, or cannot be encoded: C0 and C1
# controls, line and paragraph separators, bidirectional controls, byte order marks, lone surrogates.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_UNSAFE_BUT_LINES = re.compile(UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


class VtpError(Exception):
    """Something a user can fix; its text is one line: what was given, what is allowed, what to do.

    Whatever a message quotes, its text has no control characters (they are escaped: a line end is \\n) and at
    most `MESSAGE_LENGTH` characters (the middle is left out). Commands print it without a traceback and leave
    with `exit_code`: 1 for work that failed, 2 for bad usage (see `UsageError`).
    """

    exit_code = 1

    def __init__(self, message: object = "", *more: object) -> None:
        """Keep the message as one bounded line."""
        super().__init__(one_line(message), *more)


class UsageError(VtpError):
    """The request itself is wrong: an unknown name, a number out of range, options that contradict."""

    exit_code = 2


class RequestError(UsageError):
    """What is asked is wrong; the text quotes that and the model's tokens, and nothing else.

    So a server passes it on as it is: what looks like a path in it came from the client. Not to be raised
    with the name of a file, an address, or a library's text.
    """


def escape(text: str, lines: bool = False) -> str:
    """`text` with control characters written out, such as \\x1b; with `lines`, line ends and tabs stay."""
    unsafe = _UNSAFE_BUT_LINES if lines else UNSAFE
    return unsafe.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def shown(value: object, limit: int = VALUE_LENGTH) -> str:
    """A name or value from elsewhere, as one line of at most `limit` characters that a terminal can take."""
    return _cut(escape(str(value)[: limit + 1]), limit)


def quoted(value: object, limit: int = VALUE_LENGTH) -> str:
    """The same of any value, as Python writes it: text in quotes; huge numbers and deep lists are cut."""
    try:
        text = repr(_start(value, limit + 1))
    except Exception:  # an integer of more digits than Python prints, one in a set, what fails by itself
        kind = type(value).__name__
        text = f"a very large {kind}" if isinstance(value, int) else f"of type {kind}"
    # JSON values are written on one line; arrays and callers' own values may take several.
    return _cut(escape(" ".join(text.split()) if "\n" in text else text), limit)


def quoted_argument(value: object) -> str:
    """A value that a caller of the Python interface gave: short, for it stands amid an explanation."""
    return quoted(value, ARGUMENT_LENGTH)


def _start(value: object, count: int) -> object:
    """As much of a long value as `count` characters of its text can show."""
    if type(value) in (str, bytes, list, tuple):
        return value[:count]  # type: ignore[index]
    return dict(islice(value.items(), count)) if type(value) is dict else value


def one_line(message: object) -> str:
    """A whole message as one line: escaped, the middle left out where it is too long."""
    text = escape(str(message))
    if len(text) <= MESSAGE_LENGTH:
        return text
    tail = MESSAGE_LENGTH // 3
    head = MESSAGE_LENGTH - tail - 1
    return f"{text[:head]}…{text[-tail:]}"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def nearest(name: str, known: list[str]) -> str:
    """Return "; did you mean 'x'?" for the known name closest to `name`, or nothing."""
    from difflib import get_close_matches

    match = get_close_matches(name[:VALUE_LENGTH], known, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
