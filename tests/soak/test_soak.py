"""A few seconds of `make soak`, and that a leak of each kind is found."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .__main__ import ask
from .growth import Sample, grown

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts in /proc")


def test_a_short_run_grows_nothing(exported: Callable[[str], Any]) -> None:
    bundles = [str(exported(name).folder) for name in ("vispruner", "none")]
    command = [sys.executable, "-m", "tests.soak", "--seconds", "5", "--least", "60", "--bundles", *bundles]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("soak: 5 s, ") and "; 0 bad (seed 0)" in done.stdout


def leaking(what: Callable[[], object]) -> list[str]:
    held: list[object] = []
    gc.freeze()  # else every look would go through all that the other tests have loaded
    try:
        return grown(ask({"leak": lambda: held.append(what())}, 0.0, 60, random.Random(0))[1])
    finally:
        gc.unfreeze()


def test_each_leak_is_found() -> None:
    opened: list[int] = []
    stop = threading.Event()

    def start() -> threading.Thread:
        thread = threading.Thread(target=stop.wait)
        thread.start()
        return thread

    try:
        (line,) = leaking(lambda: opened.append(os.open(os.devnull, os.O_RDONLY)))
        assert line.startswith("descriptors grew")
        (line,) = leaking(start)
        assert line.startswith("threads grew")
        (line,) = leaking(lambda: bytearray(os.urandom(1)) * 2**20)
        assert line.startswith("resident memory grew")
    finally:
        stop.set()
        for one in opened:
            os.close(one)


def test_what_goes_up_and_down_does_not_grow() -> None:
    assert grown([Sample(200 + number % 7, 12 + number % 3, 4) for number in range(50)]) == []
    assert grown([Sample(200, 12, 4)] * 3) == ["too short a run: fewer than five samples"]
