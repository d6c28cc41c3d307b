"""Calibration on a local Ray with two workers, one of which is killed: the same results as in one process.

Runs where Ray is installed: make test-ray.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vtp.calib import cli
from vtp.calib.workers.cluster import Ray
from vtp.calib.workers.local import Job, Local
from vtp.engines import UsageError, VtpError
from vtp.runtime.bundle.folder import open_bundle

from .asked import unpruned_answers

pytest.importorskip("ray", reason="Ray is not installed: pip install 'vtp-edge[ray]', or make test-ray")

QUESTIONS = 72  # nine chunks at each keep-count
ONE_THREAD = ["--threads", "1", "--max-new-tokens", "6"]
TWO_WORKERS = ["--ray", "local", "--workers", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, exported: Any) -> Path:
    """Questions whose accepted answers are what the unpruned model says to every second of them."""
    return unpruned_answers(
        tmp_path_factory.mktemp("data"), exported("none").folder, QUESTIONS, wrong=range(0, QUESTIONS, 2)
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster with two cores that somebody else started."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield made.address
    made.shutdown()


def journal(out: Path) -> dict[tuple[str, int, str], tuple[str, list[int]]]:
    """The answers written down, without their times."""
    entries = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    return {(one["bundle"], one["keep"], one["question"]): (one["text"], one["tokens"]) for one in entries}


def busy_workers(above: int) -> list[int]:
    """Processes below `above` that are doing a chunk; Ray names them by what they do."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if (entry / "cmdline").read_bytes().startswith(b"ray::Worker.do"):
                    found.append(int(entry.name))
            except OSError:  # it ended
                continue

    def is_below(pid: int) -> bool:
        return pid == above or (pid in parents and is_below(parents[pid]))

    return [pid for pid in found if is_below(pid)]


def kill_one(run: subprocess.Popen[str], answers: Path) -> int:
    """Kill a worker in the middle of a chunk, once answers are there; returns how many were."""
    while run.poll() is None:
        written = answers.read_text().count("\n") if answers.exists() else 0
        workers = busy_workers(run.pid) if written else []
        if len(workers) == 2:
            os.kill(workers[0], signal.SIGKILL)
            return written
        time.sleep(0.002)
    raise AssertionError(f"the run ended before a worker could be killed: {run.communicate()}")


def test_a_killed_worker_changes_nothing(exported: Any, data: Path, tmp_path: Path, capsys: Any) -> None:
    goal = ["--reference", str(exported("none").folder), "--budget-ms", "1e6", "--json", *ONE_THREAD]
    bundles = [shutil.copytree(exported("vispruner").folder, tmp_path / name) for name in ("one", "two")]
    assert cli.main(["keep", str(bundles[0]), "--data", str(data), *goal]) == 0
    here = json.loads(capsys.readouterr().out)
    command = [sys.executable, "-m", "vtp.calib.cli", "keep", str(bundles[1]), "--data", str(data), *goal]
    run = subprocess.Popen(
        [*command, *TWO_WORKERS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    written = kill_one(run, tmp_path / "two-calib/answers.jsonl")
    said, complaints = run.communicate(timeout=240)
    assert run.returncode == 0, complaints
    assert written < 3 * QUESTIONS
    there = json.loads(said)
    assert there["keep"] == here["keep"] and there["unpruned"] == here["unpruned"]
    for keep, tried in here["tried"].items():
        assert {**there["tried"][keep], "ttft_ms": 0} == {**tried, "ttft_ms": 0}
        assert there["tried"][keep]["ttft_ms"] > 0  # timed on this machine
    answers = [journal(tmp_path / f"{name}-calib") for name in ("one", "two")]
    assert answers[0] == answers[1] and len(answers[0]) == 3 * QUESTIONS


def test_a_cluster_quantises_to_the_same_bytes(
    exported: Any, data: Path, tmp_path: Path, cluster: str, capsys: Any
) -> None:
    source = str(exported("vispruner").folder)
    given = ["quantize", source, "--data", str(data), "--samples", "10", "--limit", "24", "--force", "--json"]
    for name, where in (("one", []), ("two", ["--ray", cluster])):
        output = ["--output", str(tmp_path / name), "--out", str(tmp_path / f"{name}-calib")]
        assert cli.main([*given, *output, *ONE_THREAD, *where]) == 0
    reports = [json.loads(text + "}") for text in capsys.readouterr().out.split("\n}\n") if text]
    assert reports[0]["accuracy"] == reports[1]["accuracy"]
    assert reports[0]["quantization"]["layers"] == reports[1]["quantization"]["layers"] != {}
    one, two = (open_bundle(tmp_path / name, check_hashes=True).manifest.files for name in ("one", "two"))
    assert one == two
    assert journal(tmp_path / "one-calib") == journal(tmp_path / "two-calib")
    assert not list(tmp_path.glob(".*"))


def test_a_run_here_goes_on_with_answers_from_ray(
    exported: Any, data: Path, tmp_path: Path, cluster: str, capsys: Any
) -> None:
    given = ["score", f"{exported('vispruner').folder}:3", "--data", str(data), "--limit", "20", "--json"]
    given += [*ONE_THREAD, "--out", str(tmp_path)]
    assert cli.main([*given, "--ray", cluster]) == 0
    there, lines = json.loads(capsys.readouterr().out), (tmp_path / "answers.jsonl").read_bytes()
    assert cli.main(given) == 0
    assert json.loads(capsys.readouterr().out) == there
    assert (tmp_path / "answers.jsonl").read_bytes() == lines


class Numbers(Job[int, int]):
    """Squares, of which one is refused; it reads a file that no worker has if so told."""

    engine = "ort-cpu"

    def __init__(self, *files: Path) -> None:
        self._files = files

    def files(self) -> tuple[Path, ...]:
        """As told."""
        return self._files

    def open(self) -> Any:
        """Squares."""
        from contextlib import nullcontext

        return nullcontext(square)


def square(number: int) -> int:
    if number == 13:
        raise UsageError("13 is refused")
    time.sleep(0.05 * (number % 3))  # so that they end in another order
    return number * number


def test_results_come_in_order_and_errors_as_they_were(cluster: str, tmp_path: Path) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test's module
    workers = Ray(cluster)
    try:
        assert list(workers.run(Numbers(), range(12))) == list(Local().run(Numbers(), range(12)))
        with pytest.raises(UsageError, match=r"^13 is refused$"):
            list(workers.run(Numbers(), range(20)))
        with pytest.raises(
            VtpError, match=r"^a worker of --ray on \S+ does not see .*elsewhere; bundle, output"
        ):
            list(workers.run(Numbers(tmp_path / "elsewhere"), [1]))
        assert list(workers.run(Numbers(tmp_path), [3])) == [9]
    finally:
        workers.close()
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Imports(Numbers):
    """Which module of a name a worker would import."""

    def open(self) -> Any:
        """Its file, or "" for none."""
        from contextlib import nullcontext

        return nullcontext(
            lambda number: getattr(importlib.util.find_spec(f"strange_{number}"), "origin", "")
        )


def test_workers_import_nothing_from_the_current_folder(
    cluster: str, tmp_path: Path, monkeypatch: Any
) -> None:
    from ray import cloudpickle

    (tmp_path / "strange_1.py").touch()
    monkeypatch.chdir(tmp_path)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    workers = Ray(cluster, 1)
    try:
        assert list(workers.run(Imports(), [1])) == [""]
        assert Path.cwd() == tmp_path
    finally:
        workers.close()
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_more_threads_than_any_machine_has_are_refused(cluster: str) -> None:
    with pytest.raises(UsageError, match="no machine of Ray's cluster has the 3 cores"):
        Ray(cluster, threads=3)
