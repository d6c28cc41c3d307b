"""Panics of Rust's code print nothing of their own; everything else on standard error comes through."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from vtp.engines.errors import VtpError
from vtp.runtime.prompt.panics import without_panic_lines, without_panics
from vtp.runtime.prompt.tokenizer import PROBE, CheckedTokenizer

PANICKING = "(.|..)+$(?!\n|.)x"  # looks back more often than Oniguruma allows


@pytest.fixture
def panicking(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PANICKING), "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_panic_is_one_line_and_no_other(panicking: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the first of a process prints a line more
        with pytest.raises(VtpError, match="not a usable"):
            CheckedTokenizer(panicking)
    assert capfd.readouterr() == ("", "")


def test_the_test_can_fail(panicking: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without care the library does print."""
    with pytest.raises(BaseException, match="retry-limit"):
        Tokenizer.from_file(str(panicking)).encode(PROBE)
    assert "panicked at" in capfd.readouterr().err


def test_other_lines_come_through_in_order(panicking: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.from_file(str(panicking))
    with pytest.raises(BaseException, match="retry-limit"), without_panic_lines():
        os.write(2, b"before\n")
        try:
            tokenizer.encode(PROBE)
        finally:
            os.write(2, b"after \xff\n")
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "before\nafter \ufffd\nlater\n"


def test_many_threads_at_once(panicking: Path, capfd: pytest.CaptureFixture[str]) -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0

    def work(number: int) -> None:
        for turn in range(3):
            with pytest.raises(VtpError):
                CheckedTokenizer(panicking)
            os.write(2, f"{number}.{turn}\n".encode())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = sorted(capfd.readouterr().err.splitlines())
    assert said == [f"{number}.{turn}" for number in range(4) for turn in range(3)]
    assert not descriptors or len(list(Path("/proc/self/fd").iterdir())) == descriptors


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (b"", b""),
        (b"thread is a word; it panicked at noon\n", b"thread is a word; it panicked at noon\n"),
        (b"a\n\nthread '<unnamed>' (12) panicked at x.rs:1:2:\nwhy\nb\n", b"a\nb\n"),
        (b"thread 'main' panicked at x.rs:1:2:\ntwo\nlines\nb\n", b"b\n"),
        (
            b"\nthread '<unnamed>' panicked at x.rs:1:2:\nwhy\nnote: run with `RUST_BACKTRACE=1` environment "
            b"variable to display a backtrace\nnote: mine\n",
            b"note: mine\n",
        ),
    ],
)
def test_only_lines_about_panics_go(text: bytes, left: bytes) -> None:
    assert without_panics(text, {b"two\nlines"}) == left


@pytest.mark.parametrize("backtrace", ["0", "1", "full"])
def test_with_and_without_backtraces(panicking: Path, backtrace: str) -> None:
    """Rust reads its variable once, so each in a process of its own."""
    script = (
        "import sys; from pathlib import Path; from vtp.runtime.prompt.tokenizer import CheckedTokenizer\n"
        "for _ in range(2):\n"
        "  try: CheckedTokenizer(Path(sys.argv[1]))\n"
        "  except Exception as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(panicking)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "RUST_BACKTRACE": backtrace},
    )
    assert done.stderr == "" and done.stdout.count("not a usable") == done.stdout.count("\n") == 2


def test_closed_standard_error_is_no_error(panicking: Path) -> None:
    script = (
        "import os, sys; os.close(2); from pathlib import Path\n"
        "from vtp.runtime.prompt.tokenizer import CheckedTokenizer\n"
        "try: CheckedTokenizer(Path(sys.argv[1]))\nexcept Exception as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(panicking)], capture_output=True, text=True, check=True
    )
    assert "not a usable" in done.stdout
