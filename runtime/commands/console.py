"""What commands share: one-line errors, exit codes, output that a terminal can take, progress, tables."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from io import TextIOWrapper
from types import FrameType
from typing import Any, NoReturn, TextIO

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import UNSAFE, escape, one_line, shown
from vtp.engines.versions import own_version
from vtp.runtime.commands.stopping import saying_so
from vtp.runtime.commands.tables import table as table  # for every command, from one place

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
LEFT = "nothing was left behind"
_REAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,4})?")
_LARGEST = 2**63 - 1  # of any count, size or seed
_PATH = re.compile("DIR|FILE|FOLDER|BUNDLE|OUT")  # how an argument's metavar begins
_ENDING = ("SIGTERM", "SIGHUP")  # what asks a process to end, beside Ctrl-C


class Terminated(KeyboardInterrupt):
    """A signal asked the process to end: whatever cleans up after Ctrl-C does so now."""

    def __init__(self, number: int) -> None:
        """Keep the signal's number, from which the exit code follows."""
        super().__init__(number)
        self.number = number


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error of these commands.

    It has `--version`.
    """

    def __init__(self, **settings: Any) -> None:
        """Make the parser with argparse's own keyword arguments."""
        super().__init__(**settings)
        version = f"{(self.prog or '').partition(' ')[0]} {own_version()}"
        self.add_argument("--version", action="version", version=version, help="show the version and exit")

    def error(self, message: str) -> NoReturn:
        """Print one line and leave with exit code 2."""
        _complain(self.prog, f"{one_line(message)}; see {self.prog} --help")
        raise SystemExit(BAD_USAGE)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse as argparse does, and refuse empty text where a path is wanted: it would mean "."."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            if _PATH.match(str(action.metavar)) and "" in _texts(getattr(found, action.dest, None)):
                name = "/".join(action.option_strings) or action.metavar
                self.error(f"argument {name}: the path is empty; give one, or leave the flag out")
        return found, rest

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Take `--prompt=--` at its word: argparse before Python 3.13 drops the "--" and gives a list."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)


def _texts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def run_command(
    name: str,
    work: Callable[[], None],
    debug: bool = False,
    interrupted: str = LEFT,
    says_stopping: bool = True,
) -> int:
    """Run a command's work and turn what goes wrong into one line and an exit code.

    0 done, 1 failed, 2 bad usage, 130 interrupted (128 + the signal's number where another signal than
    Ctrl-C's asked it to end). With `debug` the traceback comes through. `interrupted` ends the line that
    tells of an interruption: what is left and how to go on. One that takes longer than a second to end says
    "stopping…" meanwhile; without `says_stopping` not, where answers that run are ended in peace.
    """
    _accept_all_text(sys.stdout)
    try:
        stopping = saying_so(lambda: note(name, "stopping…")) if says_stopping else nullcontext()
        with stopping, _signals_raise(), _without_warnings(debug):
            work()
            _write("")
    except (SystemExit, GeneratorExit):
        raise
    except BrokenPipeError:  # the reader left, as in `vtp-run ... | head -1`
        _detach(sys.stdout)
        return FAILED
    except BaseException as error:  # the tokenizer's PanicException is not an Exception
        _give_up(sys.stdout)
        if debug:
            raise
        message, code = _explain(error, interrupted)
        _complain(name, message)
        return code
    return DONE


def _explain(error: BaseException, interrupted: str) -> tuple[str, int]:
    """The line about an error, and the exit code."""
    if isinstance(error, VtpError):
        return str(error), error.exit_code
    if isinstance(error, Terminated):
        return f"ended by {signal.Signals(error.number).name}; {interrupted}", 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {interrupted}", INTERRUPTED
    if isinstance(error, OSError):
        return os_reason(error), FAILED
    if isinstance(error, MemoryError):
        return "this machine has not enough memory for the model", FAILED
    if isinstance(error, RecursionError):
        return "something in the files or options given is nested too deeply (--debug shows where)", FAILED
    # Anything else is a bug of ours; the user still gets no traceback.
    reason = shown(" ".join(str(error).split()), 300)
    return f"{type(error).__name__}: {reason} (a bug; --debug shows where)", FAILED


def os_reason(error: OSError) -> str:
    """What the system refused, of which file, and what to do about a full disk."""
    reason = error.strerror or str(error)
    named = "" if error.filename is None else f"{shown(error.filename)}: "
    cure = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{named}{shown(reason)}{cure}"


@contextmanager
def _without_warnings(debug: bool) -> Iterator[None]:
    """Libraries' warnings, such as Pillow's of odd metadata, stay from the terminal unless asked for."""
    with warnings.catch_warnings():
        if not debug and not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


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


# -- output --------------------------------------------------------------------------------------------------


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines for people; control characters that came with somebody's names are written out."""
    _write(f"{escape(text, lines=True)}\n", file)


def note(name: str, text: str) -> None:
    """Print a note, not an error, on standard error. A full disk there stops nothing."""
    _complain(name, one_line(text), "note")


def warn(name: str, text: str) -> None:
    """Print a warning, in one line, on standard error. A full disk there stops nothing."""
    _complain(name, one_line(text), "warning")


def say_json(data: Any, indent: int | None = 1) -> None:
    """Print JSON; what a terminal cannot take, or its encoding does not have, is a \\u escape."""
    text = escape_json(json.dumps(data, indent=indent, ensure_ascii=False))
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:
        text = json.dumps(data, indent=indent)
    _write(f"{text}\n")


def escape_json(text: str) -> str:
    """JSON with control characters, bidirectional controls and surrogates as \\u escapes: the same data."""
    return UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


def say_piece(piece: str) -> None:
    """Print a piece of an answer at once; on a terminal without control characters but line ends and tabs."""
    out = sys.stdout
    _write(escape(piece, lines=True) if out and out.isatty() else piece)


def _write(text: str, file: TextIO | None = None) -> None:
    """Write at once. Raises VtpError for a full disk, BrokenPipeError where the reader left."""
    stream = file or sys.stdout
    if stream is None:  # closed by the shell
        return
    try:
        print(text, end="", file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = "standard output" if stream is sys.stdout else "standard error"
        raise VtpError(f"cannot write to {where}: {os_reason(error)}") from error


def _complain(name: str, text: str, kind: str = "error") -> None:
    with suppress(OSError, ValueError):  # standard error is full, or closed: there is nobody to tell
        print(f"{name}: {kind}: {text}", file=sys.stderr, flush=True)
        return
    _detach(sys.stderr)


def _accept_all_text(stream: TextIO | None) -> None:
    """Letters that the terminal's encoding lacks are escaped instead of ending the command."""
    if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")


def _give_up(stream: TextIO | None) -> None:
    """Flush what was said. A stream that refuses is detached, or Python's own at exit prints a traceback."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        _detach(stream)


def _detach(stream: TextIO | None) -> None:
    """Let what is still in a stream go nowhere."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


# -- options -------------------------------------------------------------------------------------------------


def whole_number(name: str, text: str, least: int | None = None) -> int:
    """An option's whole number, at least `least`. Raises UsageError."""
    digits = text[1:] if text.startswith("-") else text
    wanted = "a whole number" if least is None else f"a whole number of at least {least}"
    if not (digits.isascii() and digits.isdecimal()):
        raise UsageError(f"{name} '{shown(text)}' is not {wanted}")
    short = digits.lstrip("0") or "0"  # Python itself reads no more than 4,300 digits
    if len(short) > len(str(_LARGEST)) or int(short) > _LARGEST:
        raise UsageError(f"{name} '{shown(text, 40)}' is too large a number; the largest is {_LARGEST}")
    value = -int(short) if text.startswith("-") else int(short)
    if least is not None and value < least:
        raise UsageError(f"{name} '{shown(text)}' is not {wanted}")
    return value


def real_number(name: str, text: str) -> float:
    """An option's number, written in digits as in JSON. Raises UsageError."""
    if not _REAL.fullmatch(text):
        raise UsageError(f"{name} '{shown(text, 40)}' is not a number")
    return float(text)


# -- progress ------------------------------------------------------------------------------------------------


class Progress:
    """Steps of a long command: one line rewritten on a terminal, plain lines elsewhere; on standard error."""

    def __init__(self) -> None:
        self._done = 0
        self._started = time.monotonic()
        self._terminal = sys.stderr is not None and sys.stderr.isatty()

    def step(self, what: str) -> None:
        """Say what is being done now, and how many seconds have passed."""
        self._done += 1
        line = f"[{time.monotonic() - self._started:5.1f} s] {self._done}. {shown(what)}"
        self._print(f"\r\033[2K{line}" if self._terminal else f"{line}\n")

    def end(self) -> None:
        """Clear the line."""
        if self._terminal:
            self._print("\r\033[2K")

    def _print(self, text: str) -> None:
        with suppress(OSError, ValueError):  # standard error that is full or closed stops no work
            print(text, end="", file=sys.stderr, flush=True)
