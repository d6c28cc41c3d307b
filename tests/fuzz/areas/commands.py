"""A command run in the worker, and what every command promises about its output."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence

from subject import Wrong

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import MESSAGE_LENGTH, UNSAFE

LONGEST = MESSAGE_LENGTH + 200  # of a line of error: the message, the command's name and how to get help


class _Terminal(io.StringIO):
    """Standard output as a terminal, on which an answer's control characters are escaped as well."""

    def isatty(self) -> bool:
        return True


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str], is_json: bool) -> str:
    """What a command printed. Raises what it refused, and Wrong where it broke a promise."""
    out, err = _Terminal(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
    text, told = out.getvalue(), err.getvalue()
    if code:
        _check_refusal(code, text, told)
        raise (UsageError if code == UsageError.exit_code else VtpError)(told.rstrip("\n"))
    _check_text(text)
    if is_json:
        _check_json(text)
    return text


def _check_refusal(code: int, out: str, err: str) -> None:
    if code not in (1, 2) or out:
        raise Wrong(f"exit code {code}, and on standard output {out[:100]!r}")
    if err.count("\n") != 1 or "(a bug;" in err or len(err) > LONGEST:
        raise Wrong(f"standard error: {err[:400]!r}")
    _check_text(err)


def _check_text(text: str) -> None:
    for line in text.split("\n"):
        found = UNSAFE.search(line.replace("\t", " "))
        if found:
            raise Wrong(f"control character {found[0]!r} in {line[:200]!r}")


def _check_json(text: str) -> None:
    def refuse(name: str) -> None:
        raise Wrong(f"{name} in JSON")

    for line in text.splitlines() if text.startswith("{") and text.count("\n") == 1 else [text]:
        json.loads(line, parse_constant=refuse)
