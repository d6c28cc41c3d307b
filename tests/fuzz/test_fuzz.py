"""A short, deterministic run of the fuzzer, all kept cases, and proof that it tells bad outcomes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
AREAS = (
    "bundles",
    "graphs",
    *(("openvino",) if importlib.util.find_spec("openvino") else ()),
    "templates",
    "tokenizers",
    "pictures",
    "prompts",
    "options",
    "questions",
    "checkpoints",
)


@pytest.fixture(scope="module")
def fuzz(
    exported: Callable[[str], Any], picture_file: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the fuzzer with some flags on the tests' own bundle."""
    made = exported("vispruner")
    subject = {"bundle": str(made.folder), "model": str(made.model), "picture": str(picture_file)}

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(HERE / "run.py"), "--workers", "1", "--subject", json.dumps(subject)]
        return subprocess.run([*command, *flags], capture_output=True, text=True, check=False)

    return run


def test_a_short_run_finds_nothing(fuzz: Any) -> None:
    done = fuzz("--cases", "200", "--seed", "13")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(AREAS)
    assert all(" 0 bad" in line and " cases: " in line for line in lines)


def test_what_was_found_once_stays_mended(fuzz: Any) -> None:
    kept = list((HERE / "cases").glob("*.json"))
    done = fuzz("--replay", str(HERE / "cases"))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert sum(int(line.split()[1]) for line in done.stdout.splitlines()) == len(kept) > 0


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(HERE))
    try:
        spec = importlib.util.spec_from_file_location(f"fuzz_{name}", HERE / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A worker whose only area does whatever bad thing its case asks for."""
    folder = tmp_path_factory.mktemp("fuzz")
    for path in HERE.glob("*.py"):
        (folder / path.name).write_text(path.read_text().replace("parents[2]", "parents[0]"))
    (folder / "areas").mkdir()
    (folder / "areas/worst.py").write_text(
        """
import os, signal, sys
from pathlib import Path
from subject import Wrong
from vtp.engines import VtpError
class Area:
    def __init__(self, subject, scratch): pass
    def draw(self, rng): return [["answer"]]
    def run(self, steps):
        for what, *more in steps:
            if what == "answer": return
            if what == "refuse": raise VtpError("no")
            if what == "wrong": raise Wrong("7 instead of 8")
            if what == "raise": raise KeyError("x")
            if what == "lines":
                error = VtpError("")
                error.args = ("one\\ntwo",)
                raise error
            if what == "die": os.kill(os.getpid(), signal.SIGSEGV)
            if what == "leave": os._exit(3)
            if what == "memory": bytes(8 << 30)
            if what == "print": os.write(2, b"noise")
            if what == "write": Path("elsewhere").touch()
            if what == "hang":
                while True: pass
"""
    )
    worker_file = folder / "worker.py"
    worker_file.write_text(worker_file.read_text().replace("SECONDS = 20", "SECONDS = 1"))
    pool = load("pool")
    pool.__file__ = str(folder / "pool.py")
    one = pool.Worker(load("subject").Subject("", "", ""))
    yield one
    one.close()


@pytest.mark.parametrize(
    ("steps", "kind", "why"),
    [
        ([["answer"]], "answered", ""),
        ([["refuse"]], "refused", "no"),
        ([["wrong"]], "bad", "wrong: 7 instead of 8"),
        ([["raise"]], "bad", "KeyError areas/worst.py:"),
        ([["lines"]], "bad", "message of 7 characters"),
        ([["die"]], "bad", "died of SIGSEGV"),
        ([["leave"]], "bad", "left with code 3"),
        ([["memory"]], "bad", "MemoryError"),
        ([["print"]], "bad", "noise: 'noise'"),
        ([["hang"]], "bad", "took too much processor time"),
        ([["write"]], "bad", "wrote outside its folder"),
        ([["answer"]], "answered", ""),
    ],
)
def test_every_bad_outcome_is_told(worker: Any, steps: Any, kind: str, why: str) -> None:
    found, verdict = worker.ask({"area": "worst", "steps": steps})
    assert (found, verdict["kind"]) == (steps, kind) and verdict["why"].startswith(why)


def test_a_case_is_made_as_short_as_it_can_be(worker: Any) -> None:
    why = worker.ask({"area": "worst", "steps": [["raise"]]})[1]["why"]
    steps = [["pass", 1], ["raise"], ["pass", 2]]
    assert load("run").shorter(worker, "worst", steps, why) == [["raise"]]


def test_cases_follow_from_the_seed_alone() -> None:
    run = load("run")
    first, again = ([*run.draw_cases(seed, list(AREAS), 40)] for seed in (3, 3))
    assert first == again != [*run.draw_cases(4, list(AREAS), 40)]
    assert {case["area"] for case in first} == set(AREAS)
