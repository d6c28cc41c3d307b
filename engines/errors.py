"""The one exception that a user is meant to read."""

from __future__ import annotations


class VtpError(Exception):
    """Something a user can mend; its text is one line: what was given, what is allowed, what to do.

    Commands print it without a traceback and leave with `exit_code`: 1 for work that failed,
    2 for bad usage (see `UsageError`).
    """

    exit_code = 1


class UsageError(VtpError):
    """The request itself is wrong: an unknown name, a number out of range, options that contradict."""

    exit_code = 2


def nearest(name: str, known: list[str]) -> str:
    """Return "; did you mean 'x'?" for the known name closest to `name`, or nothing."""
    from difflib import get_close_matches

    match = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
