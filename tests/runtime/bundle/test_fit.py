"""What does not fit is refused at load in one line; the figures are held to what is really taken."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx import numpy_helper as numbers

from vtp import Pipeline
from vtp.engines import VtpError
from vtp.engines.graph.file import read_graph
from vtp.runtime.bundle.fit import _copied, check_fits, least_memory
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.bundle.memory import bundle_memory
from vtp.runtime.commands.run import main
from vtp.runtime.machine.room import Room, memory_room

TIGHT = Room(1000, "what a test leaves")


def files_of(bundle: Bundle) -> list[str]:
    return sorted({stage.file for stage in bundle.manifest.stages})


def with_capacity(source: Path, folder: Path, capacity: int) -> Path:
    """A copy of a bundle whose decoder's cache has another length."""
    shutil.copytree(source, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["max_length"] = capacity
    for graph in manifest["graphs"].values():
        if graph["kv"]:
            graph["kv"]["capacity"] = capacity
            graph["axes"]["capacity"] = [1, capacity, capacity]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


# -- the figure ----------------------------------------------------------------------------------------------

MEASURE = """
import sys
from vtp.engines import open_graph

def anonymous():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

open_graph(sys.argv[2], "ort-cpu", threads=1)  # what the library takes by itself
before = anonymous()
kept = open_graph(sys.argv[1], "ort-cpu", threads=1)
print(anonymous() - before)
"""


def product(dtype: type) -> tuple[list[onnx.NodeProto], list[np.ndarray], Any]:
    random = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", ["x", "w0"], ["h"]), helper.make_node("MatMul", ["h", "w1"], ["y"])]
    weights = [random.random((2048, 2048)).astype(dtype) for _ in range(2)]
    return nodes, weights, helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def four_bits() -> tuple[list[onnx.NodeProto], list[np.ndarray], Any]:
    sizes = {"K": 4096, "N": 4096, "bits": 4, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", "w0", "w1"], ["y"], domain="com.microsoft", **sizes)
    weights = [np.full((4096, 128, 16), 7, np.uint8), np.ones(4096 * 128, np.float32)]
    return [node], weights, TensorProto.FLOAT


def table() -> tuple[list[onnx.NodeProto], list[np.ndarray], Any]:
    """Embeddings: their file is mapped, and nothing is copied."""
    return [helper.make_node("Gather", ["w0", "x"], ["y"])], [np.ones((8192, 1024), np.float32)], None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux's /proc")
@pytest.mark.parametrize(
    ("made", "least"),
    [
        (product(np.float32), 2 * 2048 * 2048 * 4),
        (product(np.float16), 2 * 2048 * 2048 * 4),
        (four_bits(), 4096 * 128 * 16),
        (table(), 0),
    ],
    ids=["float32", "float16", "int4", "embeddings"],
)
def test_a_session_takes_at_least_what_is_counted(made: Any, least: int, tmp_path: Path) -> None:
    nodes, weights, kind = made
    given = helper.make_tensor_value_info("x", kind or TensorProto.INT64, [1, None] if kind else [1])
    told = helper.make_tensor_value_info("y", kind or TensorProto.FLOAT, None)
    held = [numbers.from_array(weight, f"w{place}") for place, weight in enumerate(weights)]
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", [given], [told], held)
    path, small = tmp_path / "g.onnx", tmp_path / "small.onnx"
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    onnx.save(model, path, save_as_external_data=True, location="g.onnx.data", size_threshold=0)
    rows = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    plain = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "s", rows[:1], rows[1:])
    onnx.save(helper.make_model(plain, opset_imports=domains[:1], ir_version=9), small)
    command = [sys.executable, "-c", MEASURE, str(path), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert _copied(read_graph(path)) == least
    assert int(done.stdout) >= 0.95 * least


@pytest.mark.parametrize("name", ["adaptprune", "float16", "jetpack6", "tied"])
def test_the_least_is_no_more_than_the_most(exported: Callable[[str], Any], name: str) -> None:
    bundle = open_bundle(exported(name).folder)
    least = least_memory(bundle, files_of(bundle))
    assert 0 < least.total < bundle_memory(bundle, "ort-cpu").total
    kv = [graph.kv for graph in bundle.manifest.graphs.values() if graph.kv]
    width = {"float32": 4, "float16": 2}[kv[0].dtype]
    assert least.caches == sum(
        2 * len(one.layers) * one.heads * one.capacity * one.head_dim * width for one in kv
    )


# -- the limits ----------------------------------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


FREE = {"proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 5000 kB\nSwapTotal: 900 kB\nSwapFree: 100 kB\n"}
GROUP = {"sys/fs/cgroup/memory.max": "2000000\n", "sys/fs/cgroup/memory.current": "500000\n"}


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({}, None),
        (FREE, Room(5100 * 1024, "this machine's free memory and swap")),
        ({**FREE, **GROUP}, Room(1_500_000 + 102_400, "what its control group (container) leaves")),
        (
            {"proc/meminfo": "MemAvailable: 1000 kB\n", **GROUP},
            Room(1000 * 1024, "this machine's free memory and swap"),
        ),
        ({"proc/meminfo": "MemAvailable: kB\n"}, None),
    ],
)
def test_the_tightest_limit_is_told(tmp_path: Path, files: dict[str, str], room: Room | None) -> None:
    assert memory_room(tree(tmp_path, files)) == room


def test_a_bundle_beyond_a_limit_is_one_line(exported: Callable[[str], Any]) -> None:
    bundle = open_bundle(exported("none").folder)
    least = least_memory(bundle, files_of(bundle)).total
    with pytest.raises(VtpError, match=r"needs at least .* MB .*what a test leaves is 0\.0 MB: ") as caught:
        check_fits(bundle, "ort-cpu", TIGHT)
    message = str(caught.value)
    assert "\n" not in message and "vtp-calib quantize" in message and "check_memory=False" in message
    with pytest.raises(VtpError):
        check_fits(bundle, "ort-cpu", Room(least - 1, "x"))
    check_fits(bundle, "ort-cpu", Room(least, "x"))
    check_fits(bundle, "ort-cpu", None)
    check_fits(bundle, "ort-cuda", TIGHT)  # whose memory is another


def test_graphs_that_something_else_runs_do_not_count(exported: Callable[[str], Any]) -> None:
    bundle = open_bundle(exported("none").folder)
    kept = {stage.file for stage in bundle.manifest.stages if stage.when != "image"}
    least = least_memory(bundle, kept).total
    check_fits(bundle, "ort-cpu", Room(least, "x"), skip={"image"})
    with pytest.raises(VtpError):
        check_fits(bundle, "ort-cpu", Room(least, "x"))


# -- for real ------------------------------------------------------------------------------------------------


def test_a_cache_that_no_machine_holds_is_refused_at_load(
    exported: Callable[[str], Any], tmp_path: Path, picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_capacity(exported("none").folder, tmp_path / "b", 2**40)
    with pytest.raises(VtpError, match=r"needs at least .*MB .*--max-length below"):
        Pipeline.load(folder, "ort-cpu")
    asked = [str(folder), "--image", str(picture_file), "--prompt", "what ?", "--engine", "ort-cpu"]
    assert main(asked) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "VTP_CHECK_MEMORY=0" in line and "--no-memory-check" in line


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_the_check_can_be_turned_off(
    exported: Callable[[str], Any], tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading then goes on; what it needs is asked of the system, which has no such memory."""
    bundle = with_capacity(exported("none").folder, tmp_path / "b", 2**40)
    if how == "environment":
        monkeypatch.setenv("VTP_CHECK_MEMORY", "0")
    checks = {"check_memory": False} if how == "argument" else {}
    with pytest.raises(VtpError, match="not enough memory to load this bundle"):
        Pipeline.load(bundle, "ort-cpu", threads=1, **checks)


LIMITED = """
import resource, sys
from vtp import Pipeline
from vtp.engines import VtpError
from vtp.engines.ort.library import load_onnxruntime
load_onnxruntime()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (512 << 20), resource.RLIM_INFINITY))
try:
    Pipeline.load(sys.argv[1], "ort-cpu", threads=1)
    print("loaded")
except VtpError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
@pytest.mark.parametrize(("capacity", "said"), [(128, "loaded"), (2**21, "ulimit -v")])
def test_a_process_with_a_limit(
    exported: Callable[[str], Any], tmp_path: Path, capacity: int, said: str
) -> None:
    """2^21 places of the tiny model's cache are more than the half gigabyte that this child may take."""
    folder = with_capacity(exported("none").folder, tmp_path / "b", capacity)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert said in done.stdout and done.stdout.count("\n") == 1
    if said != "loaded":
        assert re.search(r"needs at least [\d,]+ MB .* is 5\d\d MB", done.stdout)
