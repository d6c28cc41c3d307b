"""Children and the folder they start in: nothing that lies there is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vtp.engines import VtpError, child
from vtp.engines.child import python_command, spawn
from vtp.engines.tensorrt.build_process import run_build

# What a child imports first of all: the library's own, Python's, and what engines need.
PLANTED = ("numpy", "onnxruntime", "json", "runpy", "multiprocessing", "vtp", "tensorrt")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder holds modules that leave a mark when they are imported; returns the mark's path."""
    desk, mark = tmp_path / "desk", tmp_path / "imported"
    desk.mkdir()
    trap = f"open({str(mark)!r}, 'a').write(__name__ + ' ')\nraise SystemExit('a trap was imported')\n"
    for name in PLANTED:
        (desk / f"{name}.py").write_text(trap)
    monkeypatch.chdir(desk)
    return mark


def ask(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, input='{"a": 1}', check=False).stdout


def test_the_trap_works(planted: Path) -> None:
    ask([sys.executable, "-m", "json.tool"])
    assert planted.exists()


@pytest.mark.parametrize("version", [(3, 10), (3, 11)])
def test_a_module_runs_without_the_current_folder(
    planted: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]
) -> None:
    if sys.version_info < version:
        pytest.skip("-P came with Python 3.11")
    monkeypatch.setattr(child.sys, "version_info", version)
    assert json.loads(ask(python_command("json.tool", "--indent", "1"))) == {"a": 1}
    assert ask(python_command("json.tool", "--help")).startswith("usage: ")
    assert not planted.exists()


def test_the_build_of_an_engine_imports_nothing_from_here(planted: Path, tmp_path: Path) -> None:
    job: dict[str, Any] = {"path": "g.onnx", "engine": "tensorrt-rtx", "profile": [], "options": {}}
    job |= {"timing_cache": str(tmp_path / "t"), "output": str(tmp_path / "o")}
    with pytest.raises(VtpError, match=r"no graph at g\.onnx|tensorrt_rtx is not installed"):
        run_build(job, lambda *_: None)
    assert not planted.exists()


def answer(connection: Any, word: str) -> None:
    connection.send((word, "multiprocessing" in sys.modules, os.getpid()))


def test_a_spawned_process_imports_nothing_from_here(planted: Path) -> None:
    process, connection = spawn(answer, "hello")
    assert connection.poll(60)
    assert connection.recv() == ("hello", True, process.pid)
    process.join(60)
    assert process.exitcode == 0 and not planted.exists()
    assert "PYTHONSAFEPATH" not in os.environ
