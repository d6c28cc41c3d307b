"""What is written to the log, where clients could fill it."""

from __future__ import annotations

import logging
from collections import Counter

__all__ = ["SPARING", "Sparing"]


class Sparing(logging.Filter):
    """Of warnings that clients can cause at will: lets the 1st, 10th, 100th … of each pass, numbered."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """For logging."""
        if record.levelno != logging.WARNING:
            return True
        self._counts[str(record.msg)] += 1
        count = self._counts[str(record.msg)]
        if count > 1:
            record.msg, record.args = f"{record.getMessage()} ({count} times so far)", ()
        return str(count).strip("0") == "1"


#: Of uvicorn's logger, whichever servers there are in a process.
SPARING = Sparing()
