"""What commands share: one-line errors, exit codes, progress, tables."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from vtp.engines import VtpError

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
LEFT = "nothing was left behind"
_ENDING = ("SIGTERM", "SIGHUP")  # what asks a process to end, beside Ctrl-C


class Terminated(KeyboardInterrupt):
    """A signal asked the process to end: whatever cleans up after Ctrl-C does so now."""

    def __init__(self, number: int) -> None:
        """Keep the signal's number, from which the exit code follows."""
        super().__init__(number)
        self.number = number


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error of these commands."""

    def error(self, message: str) -> NoReturn:
        """Print one line and leave with exit code 2."""
        print(f"{self.prog}: error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(BAD_USAGE)


def run_command(name: str, work: Callable[[], None], debug: bool = False, interrupted: str = LEFT) -> int:
    """Run a command's work and turn what goes wrong into one line and an exit code.

    0 done, 1 failed, 2 bad usage, 130 interrupted (128 + the signal's number where another signal than
    Ctrl-C's asked it to end). With `debug` the traceback comes through. `interrupted` ends the line that
    tells of an interruption: what is left and how to go on.
    """
    try:
        with _signals_raise():
            work()
            sys.stdout.flush()
    except VtpError as error:
        return _fail(name, str(error), error.exit_code, debug)
    except Terminated as error:
        said = f"ended by {signal.Signals(error.number).name}; {interrupted}"
        return _fail(name, said, 128 + error.number, debug)
    except KeyboardInterrupt:
        return _fail(name, f"interrupted; {interrupted}", INTERRUPTED, debug)
    except BrokenPipeError:  # the reader left, as in `vtp-run ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails too
        return FAILED
    except MemoryError:
        return _fail(name, "this machine has not enough memory for the model", FAILED, debug)
    except Exception as error:  # anything else is ours to mend, and still no traceback for the user
        reason = " ".join(str(error).split())[:300]
        return _fail(name, f"{type(error).__name__}: {reason} (a bug; --debug shows where)", FAILED, debug)
    return DONE


def _fail(name: str, message: str, code: int, debug: bool) -> int:
    if debug:
        raise
    print(f"{name}: error: {message}", file=sys.stderr)
    return code


@contextmanager
def _signals_raise() -> Iterator[None]:
    """While this holds, signals that would end the process on the spot raise `Terminated` instead.

    Signals that somebody else handles or ignores are let be, and so are those of other threads than the main.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, numbers = os.getpid(), [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked child, which has nothing to clean up
            os._exit(128 + number)
        for one in taken:  # cleaning up is not interrupted
            signal.signal(one, signal.SIG_IGN)
        raise Terminated(number)

    taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


class Progress:
    """Steps of a long command: one line rewritten on a terminal, plain lines elsewhere; on standard error."""

    def __init__(self) -> None:
        self._done = 0
        self._started = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def step(self, what: str) -> None:
        """Say what is being done now, and how many seconds have passed."""
        self._done += 1
        line = f"[{time.monotonic() - self._started:5.1f} s] {self._done}. {what}"
        if self._terminal:
            print(f"\r\033[2K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clear the line."""
        if self._terminal:
            print("\r\033[2K", end="", file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right when all their cells are numbers."""
    cells = [list(header), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [
        column > 0 and all(_is_number(row[column]) for row in cells[1:]) for column in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return bool(cell) and cell[0] in "0123456789-"
