"""Graphs that compute more than there is: an error of that run, not the end of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx import numpy_helper as numbers

FAR = 2**29  # float32 numbers: 2 GB, where 0.25 are allowed

RUN = """
import sys
import numpy as np
from vtp.engines import VtpError, open_graph
from vtp.engines.ort.arena import limit_tensors

class Room:
    bytes = 1  # the least that is given counts

limit_tensors(Room)
try:
    engine = open_graph(sys.argv[1], "ort-cpu", threads=1)
    print(engine.run({"x": engine.put(np.ones(4, np.float32))})["y"].numpy()[0])
except VtpError as error:
    print("refused:", error)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024)
"""


def node(operator: str, *inputs: str, **said: object) -> onnx.NodeProto:
    return helper.make_node(operator, list(inputs), ["big"], **said)


GROWING = {
    "ConstantOfShape": node("ConstantOfShape", "size", value=numbers.from_array(np.ones(1, np.float32))),
    "Expand": node("Expand", "first", "size"),
    "Tile": node("Tile", "first", "size"),
    "Pad": node("Pad", "first", "pads"),
    "Range": node("Range", "zero", "far", "step"),
    "Mul": node("Mul", "column", "row"),
    "MatMul": node("MatMul", "column", "row"),
    "Concat": node("Concat", *["many"] * 1024, axis=0),
    "Gather": node("Gather", "first", "places"),
}
WEIGHTS = {
    "size": np.array([FAR]),
    "pads": np.array([0, FAR]),
    "zero": np.array(0.0, np.float32),
    "far": np.array(float(FAR), np.float32),
    "step": np.array(1.0, np.float32),
    "column": np.ones((FAR >> 15, 1), np.float32),
    "row": np.ones((1, 2**15), np.float32),
    "begin": np.array([0]),
    "end": np.array([1]),
    "half": np.array([FAR >> 10]),
}


def save(path: Path, operator: str, from_input: bool) -> Path:
    """x -> (something large) -> its sum; large by constants alone, or by what the input holds."""
    first = helper.make_node("Slice", ["x" if from_input else "one", "begin", "end"], ["first"])
    many = helper.make_node("Expand", ["first", "half"], ["many"])
    places = helper.make_node(
        "ConstantOfShape", ["size"], ["places"], value=numbers.from_array(np.zeros(1, int))
    )
    tail = [
        helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    held = [numbers.from_array(value, name) for name, value in WEIGHTS.items()]
    held.append(numbers.from_array(np.ones(4, np.float32), "one"))
    rows = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    before = {"Concat": [first, many], "Gather": [first, places]}.get(operator, [first])
    graph = helper.make_graph([*before, GROWING[operator], *tail], "g", rows[:1], rows[1:], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux's /proc")
@pytest.mark.parametrize(
    ("operator", "from_input"), [*((name, False) for name in GROWING), ("Expand", True), ("Concat", True)]
)
def test_a_tensor_beyond_the_limit_is_refused(tmp_path: Path, operator: str, from_input: bool) -> None:
    """In a child of its own: the limit is a process's, and is set once."""
    path = save(tmp_path / "g.onnx", operator, from_input)
    done = subprocess.run([sys.executable, "-c", RUN, str(path)], capture_output=True, text=True, check=True)
    said, peak = done.stdout.splitlines()
    assert said.startswith("refused:") and len(said) < 700
    assert int(peak) < 700  # megabytes, the library's own included
    assert done.stderr == ""
