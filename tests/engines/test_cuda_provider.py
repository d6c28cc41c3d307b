"""What is particular to CUDA in the ONNX Runtime engine, as far as it goes without a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from vtp.engines import VtpError
from vtp.engines.graph.file import read_graph
from vtp.engines.ort.placement import cpu_nodes, record_assignment, refuse_cpu_nodes
from vtp.engines.ort.session import OrtBinding, OrtEngine, _run_options

CUDA = "CUDAExecutionProvider"


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """x [rows,3] float, and its number of rows: floats in Relu and ArgMax, whole numbers in the rest."""

    def info(name: str, kind: int, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    nodes = [
        helper.make_node("Relu", ["x"], ["y"], name="relu"),
        helper.make_node("Shape", ["x"], ["size"], name="shape"),
        helper.make_node("Add", ["size", "size"], ["twice"], name="add"),
        helper.make_node("ArgMax", ["x"], ["best"], name="best", axis=1),
    ]
    outputs = [
        info("y", TensorProto.FLOAT, ["rows", 3]),
        info("twice", TensorProto.INT64, [2]),
        info("best", TensorProto.INT64, ["rows", 1]),
    ]
    inner = [info("size", TensorProto.INT64, [2])]
    made = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, ["rows", 3])], outputs, [], value_info=inner
    )
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def session_of(graph: Path) -> Any:
    """A real session whose nodes are all on the CPU, and which remembers it."""
    options = ort.SessionOptions()
    record_assignment(options)
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def test_nodes_with_floats_that_are_left_to_the_cpu_are_listed(graph: Path) -> None:
    session = session_of(graph)
    assert sorted(cpu_nodes(read_graph(graph), session, CUDA)) == ["ArgMax", "Relu"]
    assert cpu_nodes(read_graph(graph), session, "CPUExecutionProvider") == []
    with pytest.raises(
        VtpError, match=r"2 nodes of g\.onnx have no kernel in CUDA.* x 1.*--allow-cpu-nodes"
    ) as caught:
        refuse_cpu_nodes(graph, session, CUDA)
    assert "\n" not in str(caught.value)
    refuse_cpu_nodes(graph, session, "CPUExecutionProvider")


def test_an_onnx_runtime_that_does_not_tell_is_believed(graph: Path) -> None:
    refuse_cpu_nodes(graph, SimpleNamespace(), CUDA)


def test_a_long_list_is_cut(graph: Path) -> None:
    nodes = [SimpleNamespace(op_type=f"Op{number % 7}", name=f"n{number}") for number in range(20)]
    part = SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: [part])
    with pytest.raises(VtpError, match=r"20 nodes of .*Op0 x 3, Op1 x 3.* and 2 more; go on with"):
        refuse_cpu_nodes(graph, session, CUDA)


def test_a_binding_binds_again_what_a_gpu_session_reads_on_the_host() -> None:
    """ONNX Runtime copies such an input when it is bound: later updates would never arrive."""
    calls: list[tuple[str, Any]] = []
    io = SimpleNamespace(bind_ortvalue_input=lambda name, raw: calls.append((name, raw)))
    session = SimpleNamespace(run_with_iobinding=lambda given, options: calls.append(("run", options)))
    binding = OrtBinding(session, io, {}, {"total": "value"})
    binding.run()
    binding.run()
    assert calls == [("total", "value"), ("run", None)] * 2


@pytest.mark.parametrize("places", [["Cuda", "CudaPinned", "Cpu"], None])
def test_inputs_read_on_the_host_are_known(graph: Path, places: list[str] | None) -> None:
    engine = OrtEngine(graph)
    assert engine._read_on_host() == []  # on the CPU everything is
    engine._device = "cuda"
    engine.inputs = {
        name: SimpleNamespace(shape=shape) for name, shape in (("a", (1,)), ("b", (2,)), ("c", ()))
    }  # type: ignore[misc]
    told = (
        {}
        if places is None
        else {"get_input_memory_infos": lambda: [SimpleNamespace(name=one) for one in places]}
    )
    engine._session = SimpleNamespace(**told)
    assert engine._read_on_host() == ["c"]


def test_every_binding_records_its_own_cuda_graph_and_single_runs_none(graph: Path) -> None:
    engine = OrtEngine(graph, cuda_graph=True)
    assert engine._graphs is None  # the CPU has none
    engine._graphs = iter(range(3))  # type: ignore[assignment]
    given: list[Any] = []
    real = engine._session

    class Session:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def run_with_iobinding(self, io: Any, options: Any) -> None:
            given.append(options.get_run_config_entry("gpu_graph_id"))
            real.run_with_iobinding(io)

    engine._session = Session()
    feeds = {"x": engine.put(np.ones((2, 3), np.float32))}
    for _ in range(2):
        into = {"y": engine.zeros((2, 3), "float32"), "twice": engine.zeros((2,), "int64")}
        binding = engine.bind(feeds, {**into, "best": engine.zeros((2, 1), "int64")})
        binding.run()
        binding.run()
    engine.run(feeds)
    assert given == ["0", "0", "1", "1", "-1"]


def test_a_binding_whose_recording_fails_goes_on_without_and_says_so(graph: Path) -> None:
    engine = OrtEngine(graph)
    engine._graphs = iter(range(3))  # type: ignore[assignment]
    given: list[str] = []
    real = engine._session

    class Session:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def run_with_iobinding(self, io: Any, options: Any) -> None:
            given.append(options.get_run_config_entry("gpu_graph_id"))
            if given[-1] == "0":
                raise RuntimeError("operation not permitted when stream is capturing")
            real.run_with_iobinding(io)

    engine._session = Session()
    feeds = {"x": engine.put(np.full((2, 3), 2, np.float32))}
    into = {"y": engine.zeros((2, 3), "float32"), "twice": engine.zeros((2,), "int64")}
    binding = engine.bind(feeds, {**into, "best": engine.zeros((2, 1), "int64")})
    binding.run()
    binding.run()
    assert given == ["0", "-1", "-1"] and (binding.outputs["y"].numpy() == 2).all()
    (note,) = engine.notes
    assert note.startswith("g.onnx runs without a CUDA graph: ") and "is capturing" in note


def test_a_failure_after_the_recording_is_one_of_the_graph(graph: Path) -> None:
    """What ran once with a graph was recorded: a later failure is no refusal, and is raised."""
    engine = OrtEngine(graph)
    runs = iter([None, RuntimeError("illegal address")])

    def run(io: Any, options: Any) -> None:
        if error := next(runs):
            raise error

    binding = OrtBinding(SimpleNamespace(run_with_iobinding=run), None, {}, {}, 0, engine._note_refusal)
    binding.run()
    with pytest.raises(VtpError, match="illegal address"):
        binding.run()
    assert engine.notes == []


def test_a_session_that_takes_no_cuda_graph_is_opened_without(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stand-in that takes the CUDA provider's options and refuses to capture graphs."""
    asked: list[Any] = []
    real = ort.InferenceSession

    def session(path: str, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        assert not enable_fallback  # its own second try prints, and goes on without CUDA
        asked.append(providers[0])
        if providers[0][1].get("enable_cuda_graph"):
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        made = real(path, options, providers=["CPUExecutionProvider"])
        made.get_providers = lambda: [CUDA]
        return made

    monkeypatch.setattr(ort, "InferenceSession", session)
    engine = OrtEngine(graph, "ort-cuda", allow_cpu_nodes=True, cuda_graph=True)
    assert asked == [(CUDA, {"enable_cuda_graph": "1"}), (CUDA, {})]
    assert engine._graphs is None
    assert engine.notes[0].startswith("g.onnx runs without a CUDA graph: ")
    assert "cannot use the graph capture feature" in engine.notes[0]
    plain = OrtEngine(graph, "ort-cuda", allow_cpu_nodes=True)
    assert plain.notes == [] and asked[2:] == [(CUDA, {})]


def test_run_options_are_real_ones() -> None:
    assert _run_options(-1).get_run_config_entry("gpu_graph_id") == "-1"
