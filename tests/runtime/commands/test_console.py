"""What every command does with errors, signals, full disks and text from elsewhere: one safe line each."""

from __future__ import annotations

import errno
import json
import os
import pickle
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import MESSAGE_LENGTH, VALUE_LENGTH, escape, quoted, shown
from vtp.runtime.commands import console
from vtp.runtime.shell import command_line

HOSTILE = "a\x1b]0;owned\x07b\r\x1b[2J\n\u202egnp\x9b31m\ud800"


def python(script: str, **more: Any) -> subprocess.Popen[bytes]:
    before = "import sys, os, time, tempfile\nfrom vtp.runtime.commands.console import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", before + script],
        stderr=subprocess.PIPE,
        **{"stdout": subprocess.PIPE, **more},
    )


def test_an_error_is_one_bounded_line_whatever_it_quotes() -> None:
    text = str(UsageError(f"unknown name '{HOSTILE}'; choose another"))
    assert text.isprintable() and text.startswith(
        "unknown name 'a\\x1b]0;owned\\x07b\\r\\x1b[2J\\n\\u202egnp"
    )
    long = str(VtpError("x" * 5000 + "; do this"))
    assert len(long) == MESSAGE_LENGTH and long.startswith("xx") and long.endswith("; do this")
    again = pickle.loads(pickle.dumps(UsageError(HOSTILE)))
    assert (type(again), str(again)) == (UsageError, str(UsageError(HOSTILE)))


class Unprintable:
    def __repr__(self) -> str:
        raise ZeroDivisionError


def test_values_are_escaped_and_cut() -> None:
    assert shown("naïve 日本語　👩‍💻.png") == "naïve 日本語　👩‍💻.png"
    assert len(shown("\x1b" * 5000)) == VALUE_LENGTH and shown("\x1b" * 5000).endswith("…")
    assert quoted(10**5000) == "a very large int" and len(quoted([HOSTILE] * 999)) == VALUE_LENGTH
    assert (
        quoted([[1, 2]] * 10**6, 60) == f"{repr([[1, 2]] * 20)[:59]}…" and quoted({"a": [1]}) == "{'a': [1]}"
    )
    assert quoted(np.zeros((2, 2))) == "array([[0., 0.], [0., 0.]])" and quoted("a\n  b") == r"'a\n  b'"
    assert quoted(Unprintable()) == "of type Unprintable"
    assert quoted(HOSTILE).isprintable()
    assert escape("a\tb\nc\rd", lines=True) == "a\tb\nc\\rd"


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (VtpError("no"), 1, "no"),
        (UsageError("no"), 2, "no"),
        (OSError(errno.ENOSPC, "No space left on device", "a\nb"), 1, "a\\nb: No space left on device; free"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "x: Permission denied"),
        (MemoryError(), 1, "not enough memory"),
        (RecursionError("maximum"), 1, "nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 1, "UnicodeDecodeError: "),
        (KeyboardInterrupt(), 130, "interrupted; nothing was left behind"),
        (ZeroDivisionError(HOSTILE * 100), 1, "(a bug; --debug shows where)"),
        (type("PanicException", (BaseException,), {})("a\nb"), 1, "PanicException: a b (a bug"),
    ],
)
def test_whatever_is_raised_is_one_line(raised: BaseException, code: int, says: str, capsys: Any) -> None:
    def work() -> None:
        raise raised

    assert console.run_command("vtp-run", work) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err[:-1].isprintable() and len(err) < MESSAGE_LENGTH + 100
    assert err.startswith("vtp-run: error: ") and says in err
    with pytest.raises(type(raised)):
        console.run_command("vtp-run", work, debug=True)


def test_what_argparse_says_is_escaped(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        console.Parser(prog="vtp-run").parse_args([HOSTILE + "x" * 9000])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err[:-1].isprintable() and len(err) < MESSAGE_LENGTH + 100


@pytest.mark.parametrize("argv", [[""], ["b", "--image", "a", "--image", ""], ["b", "-o", ""]])
def test_an_empty_path_is_refused(argv: list[str], capsys: Any) -> None:
    """It would mean the current folder to one reader, and that the flag was left out to another."""
    parser = console.Parser(prog="vtp-run")
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE")
    parser.add_argument("--image", action="append", default=[], metavar="FILE")
    parser.add_argument("-o", metavar="DIR")
    parser.add_argument("--prompt", metavar="TEXT")
    assert parser.parse_args(["--prompt", ""]).prompt == ""
    with pytest.raises(SystemExit):
        parser.parse_args(argv)
    assert "the path is empty" in capsys.readouterr().err


def test_warnings_of_libraries_stay_from_the_terminal() -> None:
    script = "import warnings; sys.exit(run_command('x', lambda: warnings.warn('odd metadata'), debug={}))"
    assert python(script.format(False)).communicate(timeout=60)[1] == b""
    assert b"odd metadata" in python(script.format(True)).communicate(timeout=60)[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cleans_up_as_an_interrupt_does(tmp_path: Path, number: signal.Signals) -> None:
    """A process that is asked to end cleans up, and a second signal does not stop that."""
    script = f"""
def work():
    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):
        print("ready", flush=True)
        try:
            time.sleep(60)
        finally:
            os.kill(os.getpid(), {int(number)})
sys.exit(run_command("vtp-run", work))
"""
    with python(script) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 128 + number and list(tmp_path.iterdir()) == []
    assert err == f"vtp-run: error: ended by {number.name}; nothing was left behind\n"


def test_handlers_of_others_are_let_be() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        seen: list[Any] = []
        assert console.run_command("x", lambda: seen.append(signal.getsignal(signal.SIGTERM))) == 0
        assert seen == [signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert console.run_command("x", lambda: seen.append(signal.getsignal(signal.SIGTERM))) == 0
    assert callable(seen[1]) and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("what", ["say('x' * 9)", "say_json(list(range(9999)))", "say_piece('x')"])
def test_a_full_disk_is_one_line(what: str) -> None:
    with Path("/dev/full").open("wb") as full:
        process = python(f"sys.exit(run_command('vtp-run', lambda: {what}))", stdout=full)
        err = process.communicate(timeout=60)[1].decode()
    reason = f"{os.strerror(errno.ENOSPC)}; free some space"
    assert (process.returncode, err) == (1, f"vtp-run: error: cannot write to standard output: {reason}\n")


def test_standard_error_that_is_full_stops_nothing() -> None:
    with Path("/dev/full").open("wb") as full:
        script = """
def work():
    Progress().step("one")
    note("vtp-run", "two")
    say_json({"done": True})
sys.exit(run_command("vtp-run", work))
"""
        command = "import sys\nfrom vtp.runtime.commands.console import *\n" + script
        done = subprocess.run(
            [sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=full, check=True
        )
    assert json.loads(done.stdout) == {"done": True}


def test_streams_that_the_shell_closed() -> None:
    work = "lambda: (say('a'), say_piece('b'))"
    script = f"from vtp.runtime.commands.console import *; sys.exit(run_command('x', {work}))"
    command = f"exec {command_line(sys.executable, '-c', script)} >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_whole_in_every_encoding(encoding: str) -> None:
    data = {"text": f"é→{HOSTILE}\\x41", "n": [1.5]}
    process = python(
        f"sys.exit(run_command('x', lambda: (say_json({data!a}, indent=None), say('é→'))))",
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    first = out.decode(encoding).split("\n")[0]
    assert json.loads(first) == data and first.isprintable()


def test_an_answer_is_escaped_on_a_terminal_only() -> None:
    answer = "red\x1b]52;c;aGk=\x07\n\tblue"
    script = f"sys.exit(run_command('x', lambda: say_piece({answer!r})))"
    assert python(script).communicate(timeout=60)[0].decode() == answer
    ours, theirs = pty.openpty()
    with python(script, stdout=theirs) as process:
        process.wait(60)
    os.close(theirs)
    assert os.read(ours, 999).decode().replace("\r\n", "\n") == "red\\x1b]52;c;aGk=\\x07\n\tblue"
    os.close(ours)


def test_tables_and_progress_are_escaped(capsys: Any) -> None:
    text = console.table(["name", "n"], [[HOSTILE, 1], ["b" * 5000, 2]])
    assert all(line.isprintable() for line in text.split("\n")) and text.count("\n") == 3
    console.Progress().step(HOSTILE)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err[:-1].isprintable()


@pytest.mark.parametrize("name", ["a b", 'it\'s $HOME `x` "q"', "-rf", "é\x1b[2J\n\\n'", "\udcff\udcfe", ""])
def test_printed_commands_can_be_pasted(name: str) -> None:
    """bash hands over the very path that was meant."""
    line = command_line("printf", "%s\\0", Path(name) if name else name)
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    wanted = f"./{name}" if name.startswith("-") else name
    assert done.stdout == os.fsencode(wanted) + b"\0"


@pytest.mark.parametrize(
    ("text", "least", "says"),
    [
        ("9" * 5000, None, "too large a number"),
        ("-" + "9" * 5000, None, "too large a number"),
        ("x\x1b", None, "is not a whole number"),
        ("-1", 0, "'-1' is not a whole number of at least 0"),
        ("٣", 0, "is not a whole number of at least 0"),
        ("", None, "'' is not a whole number"),
    ],
)
def test_numbers_of_options(text: str, least: int | None, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        console.whole_number("seed", text, least)
    assert console.whole_number("seed", "0" * 5000 + "7") == 7


@pytest.mark.parametrize("kind", [str, float])
def test_two_dashes_are_an_option_s_text(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    parser = console.Parser(prog="vtp-x")
    parser.add_argument("--value", type=kind)
    parser.add_argument("rest", nargs="*")
    if kind is str:
        assert parser.parse_args(["--value=--"]).value == "--"
        assert parser.parse_args(["--value=a", "--", "-b"]).rest == ["-b"]
    else:
        with pytest.raises(SystemExit):
            parser.parse_args(["--value=--"])
        assert "invalid float value: '--'" in capsys.readouterr().err
