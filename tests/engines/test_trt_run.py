"""Running TensorRT engines, on a stand-in for the library and for a GPU's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from vtp.engines import VtpError, open_graph
from vtp.engines.cuda.memory import CudaMemory
from vtp.engines.tensorrt.run import TrtEngine

from ..stand_ins.fake_trt import FakeMemory, install, plan

PROFILE = {"x": ((1, 3), (4, 3), (8, 3)), "cache": ((8, 3),) * 3}
STEP = {"x": ((1, 3),) * 3, "cache": ((8, 3),) * 3}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """x [rows,3], cache [8,3] -> sum [rows,3] = x + the cache's first row, present [8,3] = cache + 1."""

    def info(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    constants = [
        helper.make_tensor("first", TensorProto.INT64, [1], [0]),
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
    ]
    nodes = [
        helper.make_node("Gather", ["cache", "first"], ["row"]),
        helper.make_node("Add", ["x", "row"], ["sum"]),
        helper.make_node("Add", ["cache", "one"], ["present"]),
    ]
    inputs, outputs = (
        [info("x", ["rows", 3]), info("cache", [8, 3])],
        [info("sum", ["rows", 3]), info("present", [8, 3])],
    )
    made = helper.make_graph(nodes, "g", inputs, outputs, constants)
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMemory]:
    yield install(monkeypatch)


def engine_of(graph: Path, *profiles: dict[str, Any], **said: Any) -> TrtEngine:
    path = graph.with_suffix(".plan")
    path.write_bytes(plan(graph, list(profiles) or [PROFILE], **said))
    opened = open_graph(graph, "tensorrt", plan=path)
    assert isinstance(opened, TrtEngine)
    return opened


def feeds_of(engine: TrtEngine, rows: int = 2) -> dict[str, Any]:
    return {"x": engine.put(np.ones((rows, 3), np.float32)), "cache": engine.zeros((8, 3), "float32")}


def test_specs_have_the_graph_s_axes(graph: Path, memory: FakeMemory) -> None:
    engine = engine_of(graph)
    assert engine.inputs["x"].shape == ("rows", 3) and engine.outputs["present"].dtype == "float32"


def test_outputs_are_allocated_and_read(graph: Path, memory: FakeMemory) -> None:
    engine = engine_of(graph)
    outputs = engine.run(feeds_of(engine))
    assert list(outputs) == ["sum", "present"]
    np.testing.assert_array_equal(outputs["sum"].numpy(), np.ones((2, 3)))
    np.testing.assert_array_equal(outputs["present"].numpy(), np.ones((8, 3)))
    assert memory.calls[-1] == "wait"


def test_a_cache_that_is_past_and_present_has_two_places(graph: Path, memory: FakeMemory) -> None:
    """The engine cannot write where it reads, so the two places change roles at every run."""
    engine = engine_of(graph, PROFILE, STEP)
    feeds = feeds_of(engine)
    cache = feeds["cache"]
    before = cache.address
    engine.run(feeds, {"present": cache})
    assert cache.address != before and cache.numpy().max() == 1
    single = {"x": engine.put(np.zeros((1, 3), np.float32)), "cache": cache}
    binding = engine.bind(single, {"present": cache, "sum": engine.zeros((1, 3), "float32")})
    for turn in (1, 2, 3):
        binding.run()
        assert binding.outputs["sum"].numpy()[0, 0] == turn and cache.numpy().max() == turn + 1
    engine.run(feeds, {"present": cache})  # and a run at the other profile between two steps
    single["x"].update(np.full((1, 3), 10, np.float32))
    binding.run()
    assert binding.outputs["sum"].numpy()[0, 0] == 15 and cache.numpy().min() == 6


def test_an_engine_that_writes_in_place_keeps_one_place(graph: Path, memory: FakeMemory) -> None:
    engine = engine_of(graph, aliases={"present": "cache"})
    feeds = feeds_of(engine)
    before = feeds["cache"].address
    outputs = engine.run(feeds, {"present": feeds["cache"]})
    assert outputs["present"].address == before and outputs["present"].numpy().max() == 1
    assert engine.run(feeds)["present"] is feeds["cache"]
    with pytest.raises(VtpError, match="'present' is written where 'cache' lies: bind both to one value"):
        engine.run(feeds, {"present": engine.zeros((8, 3), "float32")})


def test_the_narrowest_profile_that_fits_is_used(graph: Path, memory: FakeMemory) -> None:
    engine = engine_of(graph, PROFILE, STEP)
    for rows in (1, 2, 1):
        engine.run(feeds_of(engine, rows))
    assert {number: context.raw.runs for number, context in engine._contexts.items()} == {1: 2, 0: 1}
    assert [context.raw.profile for context in engine._contexts.values()] == [1, 0]


def test_bindings_of_one_profile_do_not_mix(graph: Path, memory: FakeMemory) -> None:
    engine = engine_of(graph)
    bindings = []
    for number in (1.0, 2.0):
        feeds = {
            "x": engine.put(np.full((2, 3), number, np.float32)),
            "cache": engine.zeros((8, 3), "float32"),
        }
        into = {"sum": engine.zeros((2, 3), "float32"), "present": engine.zeros((8, 3), "float32")}
        bindings.append(engine.bind(feeds, into))
    for number in (0, 1, 0):
        bindings[number].run()
        assert bindings[number].outputs["sum"].numpy()[0, 0] == number + 1


def test_inputs_that_make_shapes_are_given_on_the_host(graph: Path, memory: FakeMemory) -> None:
    engine = engine_of(graph, {"x": PROFILE["x"]}, host=["cache"])
    feeds = feeds_of(engine)
    binding = engine.bind(
        feeds, {name: engine.zeros((2 if name == "sum" else 8, 3), "float32") for name in engine.outputs}
    )
    binding.run()
    feeds["cache"].update(np.full((8, 3), 4, np.float32))
    binding.run()
    assert binding.outputs["sum"].numpy()[0, 0] == 5


def test_memory_is_given_back(graph: Path, memory: FakeMemory) -> None:
    engine = engine_of(graph)
    outputs = engine.run(feeds_of(engine))
    held = outputs["sum"]
    engine.close()
    del outputs
    assert held.numpy().max() == 1  # values outlive their engine
    assert len(memory.blocks) == 1
    del held
    assert not memory.blocks
    with pytest.raises(VtpError, match="closed"):
        engine.run(feeds_of(engine))


REFUSED = {
    "too long": (
        lambda engine: engine.run(feeds_of(engine, 9)),
        r"'x' of g.onnx has shape \[9, 3\].*\[1, 3\] to \[8, 3\]",
    ),
    "missing": (lambda engine: engine.run({}), "input 'x' is missing; the graph takes x, cache"),
    "dtype": (
        lambda engine: engine.run({**feeds_of(engine), "x": engine.zeros((2, 3), "float16")}),
        "'x' is bound to float16; the graph wants float32",
    ),
    "output": (
        lambda engine: engine.run(feeds_of(engine), {"y": engine.zeros((1,), "int8")}),
        "no output 'y'",
    ),
    "output shape": (
        lambda engine: engine.run(feeds_of(engine), {"sum": engine.zeros((3, 3), "float32")}),
        r"'sum' is bound to float32\[3, 3\]; the graph gives float32\[2, 3\]",
    ),
    "unbound": (lambda engine: engine.bind(feeds_of(engine), {}), "no place is bound for output 'present'"),
    "update": (
        lambda engine: engine.zeros((2,), "int64").update(np.zeros(3, np.int64)),
        r"int64\[2\] cannot take int64\[3\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_misuse_is_one_line(graph: Path, memory: FakeMemory, name: str) -> None:
    act, message = REFUSED[name]
    engine = engine_of(graph)
    with pytest.raises(VtpError, match=message) as caught:
        act(engine)
    assert "\n" not in str(caught.value)
    assert engine.run(feeds_of(engine))["sum"].numpy()[0, 0] == 1  # and the engine lives on


def test_files_that_are_no_engine_of_the_graph_are_refused(
    graph: Path, memory: FakeMemory, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.plan"
    for content, message in (
        (b"garbage", "10.3.0 does not take engine broken.plan"),
        (b"", "cannot read engine"),
    ):
        broken.write_bytes(content)
        with pytest.raises(VtpError, match=message):
            open_graph(graph, "tensorrt", plan=broken)
    other = onnx.load(graph)
    other.graph.output.pop()
    onnx.save(other, tmp_path / "other.onnx")
    broken.write_bytes(plan(graph, [PROFILE]))
    with pytest.raises(VtpError, match=r"is not other.onnx's: they disagree about 'present'"):
        open_graph(tmp_path / "other.onnx", "tensorrt", plan=broken)
    with pytest.raises(VtpError, match="needs an engine that was built for tensorrt: run vtp-build"):
        open_graph(graph, "tensorrt")


# -- the driver ----------------------------------------------------------------------------------------------


class Driver:
    """Answers as libcuda does; `full` is how many allocations fail first."""

    def __init__(self, full: int = 0) -> None:
        self.calls: list[str] = []
        self.full, self.next = full, 4096

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "cuStreamCreate":
                arguments[0]._obj.value = 77
            if name == "cuMemAlloc_v2":
                if self.full:
                    self.full -= 1
                    return 2
                arguments[0]._obj.value = self.next
                self.next += 4096
            if name == "cuMemcpyDtoHAsync_v2":
                ctypes.memset(arguments[0], 1, arguments[2].value)
            return 0

        return call


def test_the_driver_is_asked_in_the_primary_context() -> None:
    driver = Driver()
    memory = CudaMemory(lambda: driver)
    assert memory.stream == 77
    assert driver.calls[:4] == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    address = memory.alloc(10)
    memory.zero(address, 10)
    memory.to_device(address, np.zeros(2, np.int8))
    array = np.zeros(2, np.int8)
    memory.to_host(array, address)
    assert array.tolist() == [1, 1] and driver.calls[-1] == "cuStreamSynchronize"
    assert {"cuMemsetD8Async", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"} <= set(driver.calls)


def test_freed_blocks_are_used_again() -> None:
    driver = Driver()
    memory = CudaMemory(lambda: driver)
    first = memory.alloc(300)
    memory.free(first)
    assert memory.alloc(500) == first and memory.alloc(500) != first
    assert driver.calls.count("cuMemAlloc_v2") == 2


def test_a_full_gpu_is_tried_again_without_spare_blocks_then_refused() -> None:
    driver = Driver()
    memory = CudaMemory(lambda: driver)
    memory.free(memory.alloc(100))
    driver.full = 1
    memory.alloc(5000)
    assert "cuMemFree_v2" in driver.calls
    driver.full = 2
    with pytest.raises(VtpError, match="the GPU has no 3 MB left; vtp-doctor BUNDLE"):
        memory.alloc(3_000_000)


def test_no_driver_and_a_failing_one_are_one_line() -> None:
    def missing() -> Any:
        raise OSError

    with pytest.raises(VtpError, match="no NVIDIA driver"):
        CudaMemory(missing)
    failing = Driver()
    memory = CudaMemory(lambda: failing)
    failing.__class__ = type("Failing", (Driver,), {"cuStreamSynchronize": lambda self, *_: 700})
    with pytest.raises(VtpError, match=r"cuStreamSynchronize \(error 700\)"):
        memory.wait()
