"""Graphs that are written without the onnx package are what onnx reads, and vtp-bench does without it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from vtp.bench.common.plain_graph import write_graph


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnx_reads_what_was_written(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(0)
    weights = {name: random.random((40, 40)).astype(dtype) for name in ("a", "b")}
    nodes = [("MatMul", ["x", "a"], ["x1"]), ("MatMul", ["x1", "b"], ["y"])]
    path = write_graph(tmp_path / "two.onnx", nodes, weights, dtype, ("rows", "inner", "columns"))
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "rows"
    given = random.random((3, 40)).astype(dtype)
    (found,) = ReferenceEvaluator(model).run(None, {"x": given})
    np.testing.assert_allclose(found, given @ weights["a"] @ weights["b"], rtol=1e-3)


def test_small_weights_lie_in_the_graph(tmp_path: Path) -> None:
    axes = {"axes": np.array([1])}
    nodes = [("ReduceSum", ["x", "axes"], ["y"])]
    path = write_graph(tmp_path / "sum.onnx", nodes, axes, "float32", ("rows", "inner", "one"))
    assert not Path(f"{path}.data").stat().st_size
    (found,) = ReferenceEvaluator(onnx.load(path)).run(None, {"x": np.ones((2, 300), np.float32)})
    assert found.tolist() == [[300], [300]]


def test_a_bundle_is_measured_without_onnx(exported: Callable[[str], Any], picture_file: Path) -> None:
    """As a machine with the extra [ort] alone does it."""
    absent = ("onnx", "onnxscript", "matplotlib", "torch", "transformers", "safetensors")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); "
        "from vtp.bench.measure import Task, measure; import vtp.bench.cli; "
        f"found = measure(Task({str(exported('vispruner').folder)!r}, {str(picture_file)!r}, 'how ?', None, "
        "'ort-cpu', 1, 2, 1, small_ceilings=True)); "
        "import json; print(json.dumps([found['ceiling']['gemm']['median'], found['new_tokens']]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rate, tokens = json.loads(done.stdout.splitlines()[-1])
    assert rate > 0 and tokens == 2
