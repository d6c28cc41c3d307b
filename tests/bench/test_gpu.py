"""`vtp.bench.gpu.command` on ort-cpu: it runs without a GPU, and nothing that goes wrong stops the rest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.bench.gpu import checks as gpu_checks
from vtp.bench.gpu import command as gpu
from vtp.bench.gpu import device as gpu_device
from vtp.bench.gpu import report as gpu_report
from vtp.bench.gpu.checks import Answer, Job
from vtp.engines import VtpError
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands.build import profiles_of
from vtp.runtime.opening import engines_folder

from ..stand_ins.fake_trt import install, install_gpu, store

ROOT = Path(__file__).parents[2]


class Driver:
    """A CUDA driver that answers every call with `code` and notes it."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "cuMemGetInfo_v2":
                arguments[0]._obj.value, arguments[1]._obj.value = 30, 100
            return 700 if name == self.failing else 0

        return call


def test_everything_runs_without_a_gpu(
    exported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half, wide = str(exported("float16").folder), str(exported("vispruner").folder)
    target = tmp_path / "result.json"
    arguments = ["--engine", "ort-cpu", "--quick", "--bundle", half, wide, "--json", str(target)]
    assert gpu.main(arguments) == 0
    results = json.loads(target.read_text())
    bundle = results["bundles"]["float16"]
    checks = bundle["checks"]
    assert (
        list(checks)
        == gpu_checks.checks_for("ort-cpu")
        == [one for one in gpu_checks.CHECKS if one != "engines"]
    )
    assert {one["status"] for name, one in checks.items() if name != "agreement"} == {"ok"}
    assert bundle["reference"] == "vispruner" and set(checks["agreement"]["against"]) == {
        "same bundle",
        "float32",
    }
    same = checks["agreement"]["against"]["same bundle"]
    assert same["note"] == "" and same["answers_equal"] == same["questions"] == 4
    stages = checks["times"]["ms"]
    assert {"vision_encoder", "pruner", "decoder", "decode step", "ttft", "tpot"} <= set(stages)
    assert stages["ttft"]["low"] <= stages["ttft"]["median"] <= stages["ttft"]["high"]
    assert stages["decode step"]["runs"] == 3 * 4
    assert checks["cache"]["buffers"] > 0 and checks["accuracy"]["questions"] == 8
    assert all(graph["strays"] == {} for graph in checks["nodes"]["graphs"].values())
    assert target.with_suffix(".md").read_text() == gpu_report.markdown(results)
    printed = capsys.readouterr().out
    assert "## Where nodes run" in printed and "ONNX Runtime: " in printed


def test_tensorrt_engines_are_built_compared_and_then_measured(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stand-in for the library and the GPU."""
    bundle = open_bundle(shutil.copytree(exported("jetpack6").folder, tmp_path / "bundle"))
    install_gpu(monkeypatch)
    install(monkeypatch)
    for file, graph in bundle.manifest.graphs.items():
        store(engines_folder(bundle), bundle.path(file), profiles_of(graph))
    job = Job(str(bundle.folder), "tensorrt", questions=2, rounds=1, steps=2)
    assert gpu_checks.checks_for("tensorrt") == ["engines", "times", "cache", "agreement", "accuracy"]
    checks = {
        name: gpu_checks.CHECKS[name](job, gpu_device.Cpu()) for name in ("engines", "times", "agreement")
    }
    assert [one["note"] for one in checks.values()] == ["", "", ""]
    assert set(checks["engines"]["gates"]) == set(bundle.manifest.graphs)
    cache = gpu_checks.cache(job, gpu_device.Cpu())
    assert cache["note"] == "" and cache["buffers"] == 6
    page = gpu_report.markdown(
        {
            "name": "Orin",
            "engine": "tensorrt",
            "time": "now",
            "machine": {},
            "bundles": {"b": {"checks": {name: {"status": "ok", **one} for name, one in checks.items()}}},
        }
    )
    assert (
        "## Engines against ONNX Runtime" in page
        and "| b | decoder.onnx | 1.000000 | 0.0000 | yes | 0.0 |" in page
    )


def test_float32_bundles_are_references_only_on_cuda(exported: Any) -> None:
    half, wide = str(exported("float16").folder), str(exported("vispruner").folder)
    parsed = type("Args", (), {"bundle": [half, wide], "engine": "ort-cuda", "quick": False})()
    jobs = gpu._jobs(parsed)
    assert list(jobs) == ["float16"] and jobs["float16"].reference == wide
    parsed.bundle = [half, half + "/../float16"]
    with pytest.raises(VtpError, match="two bundles are called 'float16'"):
        gpu._jobs(parsed)
    parsed.bundle = [wide]
    with pytest.raises(VtpError, match="every bundle given is float32"):
        gpu._jobs(parsed)


def test_a_failing_check_leaves_the_others_alone(tmp_path: Path) -> None:
    found = gpu.run_checks(Job(str(tmp_path / "none"), "ort-cpu"), ["cache", "nodes"], limit=60)
    assert list(found) == ["cache", "nodes"]
    for one in found.values():
        assert one["status"] == "failed" and one["note"].startswith("no bundle at ")


def test_a_check_that_hangs_is_ended() -> None:
    found = gpu.run_checks(Job("none", "ort-cpu"), ["cache"], limit=0.01)
    assert found == {"cache": {"status": "failed", "note": "took longer than 0.01 s"}}


def test_a_check_that_crashes_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    child = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert gpu._watch(child, tmp_path / "log", 60) == "its process was killed by signal 9"


def test_a_crash_after_a_good_check_counts_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([({"times": {"status": "ok", "note": ""}}, "killed"), ({"cache": {"status": "ok"}}, "")])
    asked = []

    def children(job: Job, checks: list[str], limit: float) -> Any:
        asked.append(list(checks))
        return next(rounds)

    monkeypatch.setattr(gpu, "_children", children)
    found = gpu.run_checks(Job("b", "ort-cpu"), ["times", "nodes", "cache"], 1)
    assert asked == [["times", "nodes", "cache"], ["cache"]]
    assert found["nodes"] == {"status": "failed", "note": "killed"} and found["cache"]["status"] == "ok"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--engine", "ort-gpu"], "engine 'ort-gpu' is not one of ort-cuda, ort-cpu"),
        (["--engine", "ort-cpu", "--bundle", "nowhere"], "no bundle at nowhere"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(arguments) in (1, 2)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def answer(**changes: Any) -> Answer:
    fields = {"tokens": [1, 2], "logits": np.array([1.0, 2.0], np.float32), "kept": {"keep_indices": [0, 3]}}
    return Answer(**{**fields, **changes})


def test_answers_are_compared() -> None:
    assert gpu_checks.compare([answer()], [answer()])["note"] == ""
    found = gpu_checks.compare(
        [answer(tokens=[1, 5], kept={"keep_indices": [0, 2]}), answer()], [answer(), answer()]
    )
    assert found["note"] == "1 of 2 answers differ, 1 of 2 selections differ"
    assert (found["kept_overlap"], found["relative_max"]) == (0.5, 0.0)
    other = gpu_checks.compare([answer(logits=np.array([2.0, -1.0], np.float32))], [answer()])
    assert other["note"].startswith("logits: row 0 differs") and other["cosine_min"] < 0.6
    assert other["relative_max"] > 1
    broken = gpu_checks.compare([answer(logits=np.array([np.nan, 1.0], np.float32))], [answer()])
    assert broken["note"] == "logits: row 0 has values that are not finite"
    assert gpu_checks.compare([], [])["note"] == "no answer was compared"


def test_a_session_that_falls_back_to_the_cpu_is_not_taken_for_cuda(exported: Any) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    graph = next(exported("float16").folder.glob("splice*.onnx"))
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(VtpError, match="could not start CUDA"),
    ):
        gpu_checks._assignment(graph, "ort-cuda")


def test_stages_are_timed_between_waits() -> None:
    calls: list[str] = []

    class Recorder(gpu_device.Cpu):
        def wait(self) -> None:
            calls.append("wait")

    timings = gpu_checks.WaitingTimings(Recorder())
    with timings.measure("stage"):
        calls.append("work")
    assert calls == ["wait", "work", "wait"] and timings.stages["stage"] >= 0


def test_the_gpu_is_asked_through_its_driver() -> None:
    driver = Driver()
    device = gpu_device.Cuda(lambda: driver)
    device.wait()
    assert device.used() == 70
    assert driver.calls[-3:] == ["cuCtxSetCurrent", "cuCtxSynchronize", "cuMemGetInfo_v2"]
    failing = gpu_device.Cuda(lambda: Driver("cuCtxSynchronize"))
    with pytest.raises(VtpError, match=r"cuCtxSynchronize \(error 700\)"):
        failing.wait()


def test_a_machine_without_a_driver_says_so() -> None:
    def load() -> Any:
        raise OSError("not there")

    with pytest.raises(VtpError, match="no NVIDIA driver"):
        gpu_device.Cuda(load)


def test_names_become_file_names() -> None:
    assert gpu_device.slug("NVIDIA H200 (SM 9.0)") == "nvidia-h200-sm-9-0"
    assert gpu_device.slug("//") == "unknown"


def test_the_page_says_what_failed() -> None:
    noted = {
        "status": "noted",
        "note": "on the CPU: a.onnx: Shape 2",
        "graphs": {
            "a.onnx": {
                "providers": {"CUDA": 3, "CPU": 2},
                "strays": {"Shape": 2},
                "copies": {"MemcpyToHost": 1},
            }
        },
    }
    checks = {"times": {"status": "failed", "note": "x | y"}, "nodes": noted}
    page = gpu_report.markdown(
        {
            "name": "G",
            "engine": "ort-cuda",
            "time": "now",
            "machine": {},
            "bundles": {"b": {"checks": checks}},
        }
    )
    assert "| b | times | failed: x / y |" in page and "## Times" not in page
    assert "| b | a.onnx | CUDA 3, CPU 2 | Shape 2 | MemcpyToHost 1 |" in page


def test_the_script_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    """No installed vtp: -S hides the site's finders, the links alone must do."""
    packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    surroundings = {**os.environ, "PYTHON": str(python), "VTP_LINKS": str(tmp_path), "PYTHONPATH": packages}
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu_run.sh"), "--help"],
        env=surroundings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "") and "--quick" in done.stdout
    assert (tmp_path / "vtp/engines").resolve() == ROOT / "engines"
