"""What is made once a run: by one process, whoever asks, and whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .once import Once

ASK = """
import importlib.util, os, sys, time
from pathlib import Path

spec = importlib.util.spec_from_file_location("once", sys.argv[1])
once = importlib.util.module_from_spec(spec)
sys.modules["once"] = once
spec.loader.exec_module(once)

def make(part):
    part.mkdir()
    time.sleep(0.2)
    (part / "maker").write_text(str(os.getpid()))

print((once.Once(Path(sys.argv[2])).folder("a/b", make) / "maker").read_text())
"""


def test_processes_that_ask_at_once_get_what_one_made(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ASK, str(Path(__file__).with_name("once.py")), str(tmp_path / "once")]
    asking = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {process.communicate(timeout=60)[0].strip() for process in asking}
    assert len(said) == 1 and int(said.pop()) in {process.pid for process in asking}


def test_what_failed_half_way_is_made_again(tmp_path: Path) -> None:
    once = Once(tmp_path)

    def fail(part: Path) -> None:
        part.mkdir()
        (part / "half").touch()
        raise OSError("stopped")

    with pytest.raises(OSError, match="stopped"):
        once.folder("a", fail)
    folder = once.folder("a", lambda part: part.mkdir())
    assert list(folder.iterdir()) == []


def test_other_options_are_another_folder() -> None:
    names = {
        Once.name("gqa", method="none"),
        Once.name("gqa", method="fastv"),
        Once.name("mha", method="none"),
    }
    names |= {Once.name("gqa", method="none", keep_tokens="5"), Once.name("gqa", method="none")}
    assert len(names) == 4
