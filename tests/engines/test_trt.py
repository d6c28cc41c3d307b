"""Building with the real TensorRT-RTX: what it refuses, the store of engines, and builds that die."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vtp.engines import UsageError, VtpError
from vtp.engines.cuda.driver import CudaDevice, CudaProbe
from vtp.engines.tensorrt import build as trt_build
from vtp.engines.tensorrt import build_process
from vtp.engines.tensorrt.build import (
    Room,
    check_engine,
    estimate_build,
    graph_hash,
    read_stamp,
    store_engine,
    write_stamp,
)
from vtp.engines.tensorrt.library import INSTALL, BuildOptions, build_engine, load_library, refused_nodes

ENGINE = "tensorrt-rtx"
built_here = [
    pytest.mark.trtrtx,
    pytest.mark.skipif(
        util.find_spec("tensorrt_rtx") is None, reason=f"tensorrt_rtx is not installed: {INSTALL[ENGINE]}"
    ),
]
WIDTH = 64
PROFILE = {"x": ((1, WIDTH), (8, WIDTH), (32, WIDTH))}


def save(folder: Path, middle: str = "Relu", domain: str = "", layers: int = 2) -> Path:
    """x [rows,64] float16 -> `layers` products with weights in external data, then one more operator -> y."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((WIDTH, WIDTH)).astype(np.float16), f"w{n}")
        for n in range(layers)
    ]
    names = ["x", *(f"m{n}" for n in range(layers))]
    nodes = [
        helper.make_node("MatMul", [names[n], f"w{n}"], [names[n + 1]], name=f"product{n}")
        for n in range(layers)
    ]
    nodes.append(helper.make_node(middle, [names[-1]], ["y"], name="last", domain=domain))
    rows = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["rows", WIDTH]) for name in (*names, "y")
    ]
    graph = helper.make_graph(nodes, "g", rows[:1], rows[-1:], weights, value_info=rows[1:-1])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "graph.onnx"
    onnx.save_model(
        helper.make_model(graph, opset_imports=opsets, ir_version=10),
        path,
        save_as_external_data=True,
        location="graph.onnx.data",
        size_threshold=64,
    )
    return path


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return save(tmp_path)


# -- the library -------------------------------------------------------------------------------------------


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    for engine, how in INSTALL.items():
        with pytest.raises(VtpError, match="is not installed") as caught:
            load_library(engine)
        assert how in str(caught.value)
    with pytest.raises(UsageError, match="one of tensorrt, tensorrt-rtx"):
        load_library("trt")


class TestBuilding:
    pytestmark = built_here

    def test_a_graph_builds_and_tells_its_progress(self, graph: Path) -> None:
        said: list[tuple[str, int, int]] = []
        options = BuildOptions(level=1)
        built = build_engine(graph, ENGINE, PROFILE, options, step=lambda *step: said.append(step))
        assert built.plan.nbytes > 1000 and built.timing_cache == b""
        assert said[0][0] == "Building engine" and len(said) > 5

    @pytest.mark.parametrize(("op", "domain"), [("QuickGelu", "com.microsoft"), ("NonZero", "")])
    def test_operators_it_does_not_take_are_named(self, tmp_path: Path, op: str, domain: str) -> None:
        path = save(tmp_path, op, domain)
        (line,) = refused_nodes(path, ENGINE)
        assert line.startswith(f"node 'last' ({op}): ")
        with pytest.raises(VtpError, match=rf"does not take graph.onnx: node 'last' \({op}\)") as caught:
            build_engine(path, ENGINE, PROFILE)
        assert "\n" not in str(caught.value) and "--target tensorrt" in str(caught.value)

    @pytest.mark.parametrize(
        ("profile", "message"),
        [
            ({}, "input 'x' of graph.onnx has dynamic axes"),
            ({"x": PROFILE["x"], "z": PROFILE["x"]}, "names 'z'; graph.onnx takes x"),
            ({"x": (PROFILE["x"][2], *PROFILE["x"][1:])}, "smallest <= usual <= largest"),
            ({"x": ((1, 8), (1, 8), (1, 8))}, r"which has \[-1, 64\]"),
        ],
    )
    def test_a_profile_that_does_not_fit_is_one_line(self, graph: Path, profile: dict, message: str) -> None:
        with pytest.raises(VtpError, match=message):
            build_engine(graph, ENGINE, profile)

    def test_what_is_no_graph_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "g.onnx").write_bytes(b"garbage" * 20)
        with pytest.raises(VtpError, match=r"does not take g\.onnx") as caught:
            build_engine(tmp_path / "g.onnx", ENGINE)
        assert "\n" not in str(caught.value)
        with pytest.raises(VtpError, match="no such file"):
            build_engine(tmp_path / "none.onnx", ENGINE)


# -- the store ---------------------------------------------------------------------------------------------


class TestStore:
    pytestmark = built_here

    def test_an_engine_is_built_once(self, graph: Path, tmp_path: Path) -> None:
        said: list[str] = []
        first = store_engine(
            graph, ENGINE, tmp_path / "e", PROFILE, step=lambda phase, *_: said.append(phase)
        )
        again = store_engine(graph, ENGINE, tmp_path / "e", PROFILE)
        assert (first.built, again.built, again.stamp) == (True, False, first.stamp)
        assert "Building engine" in said
        assert sorted(path.suffix for path in (tmp_path / "e").iterdir()) == [".json", ".plan"]
        assert check_engine(first.path, ENGINE, "again", graph_hash(graph), check_hash=True) == first.stamp

    def test_whatever_changes_the_engine_changes_its_key(self, graph: Path, tmp_path: Path) -> None:
        store = tmp_path / "e"
        first = store_engine(graph, ENGINE, store, PROFILE)
        wider = {"x": (PROFILE["x"][0], PROFILE["x"][1], (64, WIDTH))}
        others = [
            store_engine(graph, ENGINE, store, wider),
            store_engine(graph, ENGINE, store, PROFILE, BuildOptions(level=1)),
        ]
        data = graph.with_name("graph.onnx.data")
        data.write_bytes(data.read_bytes()[:-2] + b"\0\0")  # the last weight
        others.append(store_engine(graph, ENGINE, store, PROFILE))
        assert len({first.path, *(one.path for one in others)}) == 4

    def test_a_half_written_engine_is_built_again(self, graph: Path, tmp_path: Path) -> None:
        first = store_engine(graph, ENGINE, tmp_path / "e", PROFILE)
        first.path.write_bytes(first.path.read_bytes()[:100])
        with pytest.raises(VtpError, match=r"100 bytes of \d+: it was cut off; rebuild it with: vtp-x"):
            check_engine(first.path, ENGINE, "vtp-x")
        assert store_engine(graph, ENGINE, tmp_path / "e", PROFILE).built
        first.path.with_suffix(".json").write_text("{")
        with pytest.raises(VtpError, match="missing or was not finished"):
            check_engine(first.path, ENGINE, "vtp-x")
        assert store_engine(graph, ENGINE, tmp_path / "e", PROFILE).built

    def test_a_killed_build_is_one_line_and_the_next_one_works(self, graph: Path, tmp_path: Path) -> None:
        def kill(*_: object) -> None:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                if b"build_process" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)

        store = tmp_path / "e"
        with pytest.raises(VtpError, match=r"building graph.onnx was killed: .*out of memory.*") as caught:
            store_engine(graph, ENGINE, store, PROFILE, step=kill)
        assert "\n" not in str(caught.value) and not list(store.iterdir())
        (store / f".graph-{'0' * 16}.plan.999999999.part").touch()
        assert store_engine(graph, ENGINE, store, PROFILE).built

    def test_an_interrupt_leaves_no_build_behind(self, graph: Path, tmp_path: Path) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store_engine(graph, ENGINE, tmp_path / "e", PROFILE, step=interrupt)
        assert not list((tmp_path / "e").iterdir())

    def test_a_refused_graph_comes_out_of_the_child_as_one_line(self, tmp_path: Path) -> None:
        path = save(tmp_path, "NonZero")
        with pytest.raises(VtpError, match=r"node 'last' \(NonZero\)"):
            store_engine(path, ENGINE, tmp_path / "e", PROFILE)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("version", "1.2.0", r"built for version 1\.2\.0, this is \d"),
            ("engine", "tensorrt", "built for the engine kind tensorrt, this is tensorrt-rtx"),
            ("sm", "8.7", "built for compute capability 8.7, this is any"),
            ("graph", "f" * 64, "built for graph ffffffffffff, this is"),
        ],
    )
    def test_stale_and_foreign_engines_are_refused(
        self, graph: Path, tmp_path: Path, field: str, value: str, message: str
    ) -> None:
        stored = store_engine(graph, ENGINE, tmp_path / "e", PROFILE)
        stamp = dataclasses.replace(stored.stamp, **{field: value})
        write_stamp(stored.path, stamp)
        with pytest.raises(VtpError, match=f"{message}.*; rebuild it with: vtp-x"):
            check_engine(stored.path, ENGINE, "vtp-x", graph_hash(graph))

    def test_a_changed_engine_is_refused(self, graph: Path, tmp_path: Path) -> None:
        stored = store_engine(graph, ENGINE, tmp_path / "e", PROFILE)
        stored.path.write_bytes(bytes(stored.stamp.bytes))
        assert read_stamp(stored.path) == stored.stamp
        with pytest.raises(VtpError, match="it was changed"):
            check_engine(stored.path, ENGINE, "vtp-x", check_hash=True)

    def test_too_little_room_is_refused_before_anything_is_built(self, graph: Path, tmp_path: Path) -> None:
        with pytest.raises(
            VtpError, match=r"needs about 0\.3 GB of host memory, 0\.1 GB are free: .* would fit"
        ):
            store_engine(graph, ENGINE, tmp_path / "e", PROFILE, room=Room(host=100_000_000))
        assert not (tmp_path / "e").exists()
        assert store_engine(graph, ENGINE, tmp_path / "e", PROFILE, room=Room(host=10**12)).built

    def test_the_estimate_holds(self, tmp_path: Path) -> None:
        """What a build really took at its peak, in a process of its own."""
        path = save(tmp_path, layers=40)
        script = (
            "from vtp.engines.tensorrt.library import build_engine; "
            f"build_engine({str(path)!r}, {ENGINE!r}, {PROFILE!r}); "
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        peak = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout)
        assert peak * 1024 < 1.3 * estimate_build(path, ENGINE, PROFILE).host


# -- full TensorRT, which is not here ------------------------------------------------------------------------


def test_an_estimate_for_a_gpu_counts_weights_tensors_and_workspace(graph: Path) -> None:
    needs = estimate_build(graph, "tensorrt", PROFILE, BuildOptions(workspace=1000))
    weights = 2 * WIDTH * WIDTH * 2
    assert needs.weights == weights
    assert needs.device == weights + 3 * 32 * WIDTH * 2 + 1000  # the input and two more at a time
    assert estimate_build(graph, ENGINE, PROFILE).device == 0


@pytest.mark.parametrize(
    ("room", "what"),
    [
        (Room(10**12, 10**8), "1.1 GB of GPU memory"),
        (Room(10**9, shared=True), "1.3 GB of this board's memory"),
    ],
)
def test_gpu_and_shared_memory_are_checked(graph: Path, room: Room, what: str) -> None:
    needs = estimate_build(graph, "tensorrt", PROFILE)
    with pytest.raises(VtpError, match=what):
        trt_build._check_room("graph.onnx", needs, room)


def test_full_tensorrt_is_tied_to_its_gpu() -> None:
    card = CudaProbe([CudaDevice("Orin", "8.7", 1)])
    assert trt_build.device_sm("tensorrt", lambda: card) == "8.7"
    with pytest.raises(VtpError, match="there is none: no NVIDIA driver"):
        trt_build.device_sm("tensorrt", lambda: CudaProbe(reason="no NVIDIA driver"))


def test_what_a_library_prints_between_a_build_s_words_is_passed_over() -> None:
    said, steps = ["[TRT] hello\n", '{"phase": "p", "done": 1, "total": 2}\n', "{not json}\n"], []
    said += ['{"bytes": 3, "sha256": "x"}\n', "bye\n", "{also not}\n"]
    child = SimpleNamespace(stdin=io.StringIO(), stdout=said, wait=lambda: 0)
    assert build_process._follow(child, {}, lambda *step: steps.append(step)) == {"bytes": 3, "sha256": "x"}
    assert steps == [("p", 1, 2)]


@pytest.mark.parametrize(
    ("code", "words"), [(-9, "ran out of memory"), (-11, "signal 11"), (3, "(exit code 3): boo")]
)
def test_how_a_build_died_is_said(code: int, words: str) -> None:
    assert words in build_process._crash_message("g.onnx", code, "boo")
