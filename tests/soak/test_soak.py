"""A few seconds of `make soak`, and that a leak of each kind is found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .growth import Sample, grown

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts in /proc")


def test_a_short_run_grows_nothing(exported: Callable[[str], Any]) -> None:
    bundles = [str(exported(name).folder) for name in ("vispruner", "none")]
    command = [sys.executable, "-m", "tests.soak", "--seconds", "5", "--least", "60", "--bundles", *bundles]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("soak: 5 s, ") and "; 0 bad (seed 0)" in done.stdout


def test_a_short_run_of_the_server_grows_nothing(exported: Callable[[str], Any]) -> None:
    command = [sys.executable, "-m", "tests.soak.server", "--seconds", "3", "--least", "12"]
    command += ["--bundle", str(exported("vispruner").folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("soak of vtp-serve: 3 s, ") and "; 0 bad (seed 0)" in done.stdout


LEAKS = {
    "descriptors": "os.open(os.devnull, os.O_RDONLY)",
    "threads": "threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "resident memory": "bytearray(2**20)",
}


@pytest.mark.parametrize("kind", LEAKS)
def test_each_leak_is_found(kind: str) -> None:
    # In a process of its own: one that ran other tests reuses what they freed before it asks for more.
    code = (
        "import os, random, threading; from tests.soak.growth import ask, grown; held = []; "
        f"leak = lambda: held.append({LEAKS[kind]}); "
        "print(*grown(ask({'leak': leak}, 0.0, 60, random.Random(0))[1]), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{kind} grew from ")


def test_what_goes_up_and_down_does_not_grow() -> None:
    assert grown([Sample(200 + number % 7, 12 + number % 3, 4) for number in range(50)]) == []
    assert grown([Sample(200, 12, 4)] * 3) == ["too short a run: fewer than five samples"]


def test_a_pool_may_fill_and_no_more() -> None:
    filled, leaking = ([Sample(200, 12, 4 + number // each) for number in range(50)] for each in (10, 5))
    assert grown(filled, 4) == []
    assert grown(leaking, 4) == ["threads grew from 7 to 12"]
