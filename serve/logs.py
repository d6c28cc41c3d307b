"""What is written to the log, where clients could fill it."""

from __future__ import annotations

import logging
from collections import Counter

__all__ = ["SPARING", "Sparing", "because_of"]

_KIND = "vtp_kind"  # of a record


_ERRORS = 10  # of one kind that all pass


class Sparing(logging.Filter):
    """Of what clients can cause at will: lets the 1st, 10th, 100th … of each kind pass, numbered.

    Warnings are of the kind of their text before arguments are put in, or of what `because_of` says. Errors
    pass, but for those with `because_of`: of them the first ten, with their tracebacks, and then as warnings.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[tuple[str, str]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """For logging."""
        kind = getattr(record, _KIND, None)
        if record.levelno != logging.WARNING and kind is None:
            return True
        key = str(record.msg), str(kind)
        self._counts[key] += 1
        count = self._counts[key]
        if count > 1:
            record.msg, record.args = f"{record.getMessage()} ({count} times so far)", ()
        every = _ERRORS if record.levelno > logging.WARNING else 1
        return count <= every or str(count).strip("0") == "1"


def because_of(error: BaseException) -> dict[str, str]:
    """`extra` of a line about an error: errors of one kind are those that one place of the code raises."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    place = "" if last is None else f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}"
    return {_KIND: f"{type(error).__name__} {place}"}


#: Of uvicorn's logger, whichever servers there are in a process.
SPARING = Sparing()
