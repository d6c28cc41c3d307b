"""vtp-doctor on boards that are not here: trees of the files that a Jetson, a PC and a container have."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import pytest

from vtp.engines import Decision
from vtp.engines.cuda.driver import CudaDevice, CudaProbe
from vtp.engines.errors import VtpError
from vtp.engines.graph.file import read_graph
from vtp.engines.graph.memory import evaluate, graph_memory
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.bundle.memory import bundle_memory
from vtp.runtime.commands import doctor
from vtp.runtime.machine import engine_trial as trying
from vtp.runtime.machine.facts import Machine, Memory, look

ORIN = {
    "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/meminfo": "MemTotal: 7802828 kB\nMemFree: 1 kB\nMemAvailable: 5500000 kB\nSwapTotal: 0 kB\n",
    "var/lib/nvpmodel/status": "pmode:0001\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}',
    "var/lib/dpkg/status": "\n\n".join(
        f"Package: {name}\nStatus: install ok {state}\nVersion: {version}\nDescription: x"
        for name, state, version in (
            ("nvidia-jetpack", "installed", "6.2+b77"),
            ("libnvinfer10", "installed", "10.3.0.30-1+cuda12.5"),
            ("libnvinfer8", "config-files", "8.6.2"),
            ("bash", "installed", "5.1"),
        )
    ),
}
GPU = CudaProbe([CudaDevice("Orin", "8.7", 7990000000)], driver="12.6")
NONE = CudaProbe(reason="no NVIDIA driver")
CPU_ONLY = [
    Decision("ort-cuda", "no-provider", "this onnxruntime has no CUDA provider"),
    Decision("ort-cpu", "accepted", "ok"),
]


def machine(
    tmp_path: Path, files: dict[str, str], cuda: CudaProbe = NONE, smi: str = "", **packages: str
) -> Machine:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return look(tmp_path, lambda: cuda, lambda: packages, lambda: smi)


def test_a_jetson_is_recognised(tmp_path: Path) -> None:
    found = machine(tmp_path, ORIN, GPU)
    assert found.board == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert (found.l4t, found.jetpack, found.toolkit, found.tensorrt) == (
        "36.4.3",
        "6.2",
        "12.6.11",
        "10.3.0.30",
    )
    assert found.power == "nvpmodel 1 (25W), GPU 306 of 1020 MHz"
    assert found.memory == Memory(7802828 * 1024, 5500000 * 1024)
    assert found.is_jetson and found.gpu_memory == found.memory.usable


def test_a_jetson_without_its_metapackage_tells_the_major_version(tmp_path: Path) -> None:
    files = {"etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 1, BOARD: generic\n"}
    (tmp_path / "usr/lib/aarch64-linux-gnu").mkdir(parents=True)
    (tmp_path / "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.13.3").touch()
    found = machine(tmp_path, files)
    assert (found.l4t, found.jetpack, found.tensorrt) == ("38.2.0", "7", "10.13.3")


def test_a_pc_with_a_card(tmp_path: Path) -> None:
    files = {"proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n"}
    card = CudaProbe([CudaDevice("RTX 4090", "8.9", 25 << 30)], driver="12.4")
    found = machine(tmp_path, files, card, "RTX 4090, 550.54, 24564, 512, 450.00, 600.00")
    assert (found.driver, found.power) == ("550.54", "GPU limited to 450.00 of 600.00 W")
    assert not found.is_jetson and found.gpu_memory == (25 << 30) - (512 << 20)
    advice = doctor.examine(found, engines=CPU_ONLY)["advice"]
    assert advice == [
        "to use the RTX 4090, update the driver, which serves CUDA 12.4, for CUDA 13.0; "
        "then pip install 'vtp-edge[ort-gpu]' in place of onnxruntime"
    ]


def test_a_tensorrt_bundle_on_a_card_names_the_other_target(tmp_path: Path) -> None:
    card = CudaProbe([CudaDevice("RTX 4090", "8.9", 25 << 30)], driver="13.0")
    rejected = [Decision("ort-cuda", "target", ""), CPU_ONLY[1]]
    advice = doctor.examine(machine(tmp_path, {}, card), engines=rejected)["advice"]
    assert advice == ["to use the RTX 4090, export the bundle with --target ort"]


def test_an_empty_machine_raises_nothing(tmp_path: Path) -> None:
    found = machine(tmp_path, {}, smi="[N/A]")
    assert (found.board, found.jetpack, found.power, found.memory) == ("", "", "", Memory())
    assert "none: no NVIDIA driver" in doctor.render(doctor.examine(found, engines=CPU_ONLY))


def test_a_container_s_limit_bounds_what_is_usable(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n",
        "sys/fs/cgroup/memory.max": "2000000000\n",
        "sys/fs/cgroup/memory.current": "500000000\n",
    }
    assert machine(tmp_path, files).memory.usable == 1_500_000_000


_PLENTY = {"proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n"}


@pytest.mark.parametrize(
    ("usable", "files"),
    [
        (0, {"memory.max": "2000000000\n", "memory.current": "2000000000\n"}),  # full, which is not unlimited
        (0, {"memory.max": "2000000000\n", "memory.current": "2100000000\n"}),
        (60_000_000 * 1024, {"memory.max": "max\n", "memory.current": "2000000000\n"}),
        (
            1_300_000_000,  # the page cache is given back before anything is killed
            {
                "memory.max": "2000000000\n",
                "memory.current": "1900000000\n",
                "memory.stat": "anon 600000000\nfile 1200000000\nshmem 0\nactive_file 700000000\n"
                "inactive_file 450000000\nslab_reclaimable 50000000\n",
            },
        ),
        (
            300_000_000,  # a group above this process's own has the limit
            {
                "../../../proc/self/cgroup": "0::/user.slice/job.scope\n",
                "user.slice/memory.max": "1000000000\n",
                "user.slice/memory.current": "700000000\n",
                "user.slice/job.scope/memory.max": "max\n",
                "user.slice/job.scope/memory.current": "600000000\n",
            },
        ),
        (
            600_000_000,  # version 1
            {
                "../../../proc/self/cgroup": "9:memory:/docker/a\n1:name=systemd:/docker/a\n",
                "memory/docker/a/memory.limit_in_bytes": "1000000000\n",
                "memory/docker/a/memory.usage_in_bytes": "500000000\n",
                "memory/docker/a/memory.stat": "total_inactive_file 100000000\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "5000000000\n",
            },
        ),
    ],
)
def test_a_control_group_leaves_what_its_limit_says(
    tmp_path: Path, usable: int, files: dict[str, str]
) -> None:
    there = {str(Path(os.path.normpath(f"sys/fs/cgroup/{name}"))): text for name, text in files.items()}
    assert machine(tmp_path, {**_PLENTY, **there}).memory.usable == usable


def test_versions_are_compared_as_numbers(tmp_path: Path) -> None:
    files = {
        f"usr/lib/{arch}/libnvinfer.so.{version}": "" for arch, version in (("a", "10.3.0"), ("b", "10.13.2"))
    }
    packages = "\n\n".join(
        f"Package: cuda-toolkit-{name}\nStatus: install ok installed\nVersion: {version}"
        for name, version in (("12-9", "12.9.1-1"), ("12-10", "12.10.0-1"))
    )
    found = machine(tmp_path, {**files, "var/lib/dpkg/status": packages})
    assert (found.tensorrt, found.toolkit) == ("10.13.2", "12.10.0-1")


def test_the_report_of_a_jetson(tmp_path: Path) -> None:
    report = doctor.examine(machine(tmp_path, ORIN, GPU, onnxruntime="1.23.0"), engines=CPU_ONLY)
    text = doctor.render(report)
    for part in (
        "Jetson Orin Nano",
        "6.2 (Jetson Linux 36.4.3)",
        "Orin (SM 8.7",
        "nvpmodel 1 (25W)",
        "ort-cpu",
    ):
        assert part in text
    assert "NVIDIA's package index for JetPack 6.2" in text
    assert "sudo nvpmodel -m 0" in text and "no swap" in text
    json.dumps(report)


@pytest.mark.parametrize(
    ("version", "target", "advice"),
    [
        ("10.3.0.30", None, "for TensorRT 10.3.0.30 export with --target jetpack6, then: vtp-build BUNDLE"),
        ("10.3.0.30", "tensorrt", "--target jetpack6"),
        ("10.16.1", "ort", "for TensorRT 10.16.1 export with --target tensorrt"),
        ("10.16.1", "tensorrt", ""),
        ("10.16.1", "jetpack6", ""),
        ("", "ort", ""),
    ],
)
def test_the_target_for_this_tensorrt_is_named(version: str, target: str | None, advice: str) -> None:
    lines = doctor._advise_tensorrt(Machine(cuda=GPU, tensorrt=version), target)
    assert bool(lines) == bool(advice) and advice in "".join(lines)
    assert doctor._advise_tensorrt(Machine(cuda=NONE, tensorrt=version), target) == []


def test_a_cache_that_tensorrt_cannot_write_in_place_counts_twice(exported: Callable[[str], Any]) -> None:
    bundle = open_bundle(exported("adaptprune").folder)
    once, twice = (
        sum(stage.cache for stage in bundle_memory(bundle, name).stages) for name in ("ort-cuda", "tensorrt")
    )
    assert twice == 2 * once


def test_both_runtimes_installed_is_said(tmp_path: Path) -> None:
    found = machine(tmp_path, {}, **{"onnxruntime": "1.31", "onnxruntime-gpu": "1.31"})
    assert "overwrite each other" in doctor.examine(found, engines=CPU_ONLY)["advice"][0]
    nothing = [Decision("ort-cpu", "no-library", "onnxruntime is not installed")]
    assert doctor.examine(machine(tmp_path, {}), engines=nothing)["advice"] == [
        "no engine runs here: pip install 'vtp-edge[ort]'"
    ]


# -- memory of a bundle --------------------------------------------------------------------------------------


def test_weights_and_caches_are_exact(exported: Callable[[str], Any]) -> None:
    bundle = open_bundle(exported("adaptprune").folder)
    stages = {stage.file: stage for stage in bundle_memory(bundle, "ort-cuda").stages}
    for file, stage in stages.items():
        graph = bundle.manifest.graphs[file]
        assert stage.weights == sum(one.bytes for one in read_graph(bundle.path(file)).weights.values())
        kv = graph.kv
        assert stage.cache == (2 * len(kv.layers) * kv.heads * kv.capacity * kv.head_dim * 4 if kv else 0)
        assert stage.activations > 0
    assert stages["decoder_head.onnx"].unknown == 0


def test_activations_are_bounded_by_the_longest_prompt(exported: Callable[[str], Any]) -> None:
    path = exported("none").folder / "decoder.onnx"
    short, long = (graph_memory(path, {"batch": 1, "sequence": n, "capacity": 128}) for n in (1, 128))
    assert long.weights == short.weights and 20 < long.activations / short.activations <= 128
    assert long.scores == 4 * 128 * 128 * 4  # heads x queries x cache x float32


def test_float16_costs_more_on_the_cpu(exported: Callable[[str], Any]) -> None:
    bundle = open_bundle(exported("float16").folder)
    cpu, gpu = (
        sum(one.weights for one in bundle_memory(bundle, name).stages) for name in ("ort-cpu", "ort-cuda")
    )
    assert cpu == 3 * gpu


@pytest.mark.parametrize(
    ("free", "verdict"), [(10 << 30, "fits"), (50 << 20, "does not fit"), (0, "unknown")]
)
def test_what_fits_is_said(exported: Callable[[str], Any], free: int, verdict: str) -> None:
    bundle = open_bundle(exported("none").folder)
    report = doctor.examine(Machine(memory=Memory(free, free)), bundle, CPU_ONLY)
    assert verdict in doctor.render(report)
    assert bool(report["advice"]) == (verdict == "does not fit")
    if report["advice"]:
        assert "MB are free" in report["advice"][0]
        assert any("--method that prunes" in line for line in report["advice"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("batch*(text + visual - 1)", 18), ("-text + 12", 5), ("Max(text, 9)", 9), ("text//2", 3)],
)
def test_axes_are_evaluated(text: str, value: int) -> None:
    assert evaluate(text, {"batch": 2, "text": 7, "visual": 3}) == value


@pytest.mark.parametrize("text", ["s77", "text +", "text.real", "__import__('os')", "text//0", "1.5"])
def test_other_expressions_are_refused(text: str) -> None:
    with pytest.raises(VtpError, match="not an expression of"):
        evaluate(text, {"text": 7})


# -- the command ---------------------------------------------------------------------------------------------


def test_this_machine(capsys: pytest.CaptureFixture[str], exported: Callable[[str], Any]) -> None:
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "ort-cpu" in out and f"vtp-edge {metadata.version('vtp-edge')}" in out
    assert doctor.main([str(exported("adaptprune").folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bundle"]["total"] >= sum(stage["total"] for stage in report["bundle"]["stages"])
    assert report["machine"]["memory"]["total"] > 0


def test_no_bundle_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vtp-doctor: error:") and error.count("\n") == 1


def test_what_is_called_runnable_was_opened(
    capsys: pytest.CaptureFixture[str], exported: Callable[[str], Any], tmp_path: Path
) -> None:
    """A graph that this onnxruntime does not open, as float64 products were to 1.23: any later opset does."""
    folder = tmp_path / "bundle"
    shutil.copytree(exported("adaptprune").folder, folder)
    assert engine_of(doctor.main, [str(folder)], capsys, "ort-cpu")["accepted"]
    graph = onnx.load(folder / "splice.onnx")
    graph.opset_import[0].version = 999
    data = graph.SerializeToString()
    (folder / "splice.onnx").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["splice.onnx"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = engine_of(doctor.main, [str(folder)], capsys, "ort-cpu")
    assert not found["accepted"] and "splice.onnx" in found["reason"] and "\n" not in found["reason"]


def engine_of(main: Any, argv: list[str], capsys: pytest.CaptureFixture[str], name: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    engines = json.loads(capsys.readouterr().out)["engines"]
    return next(one for one in engines if one["engine"] == name)


def test_an_engine_that_opens_nothing_is_not_called_runnable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engine_of(doctor.main, [], capsys, "ort-cpu")["accepted"]
    monkeypatch.setattr(trying, "_SMALLEST", b"no graph")
    found = engine_of(doctor.main, [], capsys, "ort-cpu")
    assert not found["accepted"] and found["reason"].startswith("it opens no graph: ")


def test_what_would_not_fit_is_not_opened(exported: Callable[[str], Any]) -> None:
    bundle = open_bundle(exported("none").folder)
    (one,) = trying.tried([CPU_ONLY[1]], Machine(memory=Memory(10, 10)), bundle)
    assert one.accepted and one.reason == "ok; not opened, for it would not fit"
    assert trying.tried(CPU_ONLY[:1], Machine(memory=Memory(10, 10)), bundle) == CPU_ONLY[:1]
