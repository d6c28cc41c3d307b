"""Products of eight bits are those of whole numbers, on this processor as on any other.

On x86 without VNNI both libraries' kernels saturate in 16 bits by default: a machine that has VNNI passes
these tests without what engines/ort and engines/openvino do against it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vtp.calib.quantize.layers import Change, DynamicInt8, Int4, Int8, Layer, find_layers, rewrite
from vtp.calib.quantize.rounding import Range
from vtp.calib.quantize.weight_store import Store
from vtp.engines import open_graph

WIDTH, COLUMNS, CODES, BLOCK = 512, 48, 127, 32
KINDS = ("uint8 codes", "int8 codes", "standard operators", "codes of each row")


def change(kind: str, layer: Layer, seen: Range) -> Change:
    if kind == "codes of each row":
        return DynamicInt8(layer)
    if kind == "int4 weights":
        return Int4(layer, np.ones(WIDTH), BLOCK, "ort", nearest=True)
    standard = kind == "standard operators"
    return Int8(layer, seen, "uint8" if kind == "uint8 codes" else "int8", "tensorrt" if standard else "ort")


def quantised(folder: Path, kind: str, weight: np.ndarray, seen: Range) -> Path:
    """x [n,WIDTH] @ weight [WIDTH,COLUMNS] as `vtp-calib quantize` writes it."""
    info = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", COLUMNS])]
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    graph = helper.make_graph([node], "g", info, out, [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    rewrite(
        model,
        [change(kind, layer, seen) for layer in find_layers(model, "g.onnx")],
        Store(folder, folder),
        "g.onnx",
    )
    onnx.save(model, folder / "g.onnx")
    return folder / "g.onnx"


def large(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Whole numbers that are all of one sign and near the largest code: what saturates first."""
    return rng.integers(100, CODES, shape).astype(np.float32)


def mixed(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-CODES, CODES, shape).astype(np.float32)


@pytest.mark.parametrize("engine", ["ort-cpu", "openvino-cpu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drawn", [large, mixed])
def test_sums_are_those_of_whole_numbers(
    tmp_path: Path, kind: str, drawn: Callable[..., np.ndarray], engine: str
) -> None:
    """Values are codes times one, so that numpy's float64 product of them is the right one."""
    if engine == "openvino-cpu":
        pytest.importorskip("openvino", reason="openvino is not installed")
    rng = np.random.default_rng(0)
    values, weight = drawn(rng, 24, WIDTH), drawn(rng, WIDTH, COLUMNS)
    values[:, 0] = weight[0] = CODES  # so that every row's and every column's step is one
    seen = Range()
    seen.scale = lambda codes=CODES: 1.0  # type: ignore[method-assign]
    opened = open_graph(quantised(tmp_path, kind, weight, seen), engine, 1)
    found = opened.run({"x": opened.put(values)})["y"].numpy()
    want = values.astype(np.float64) @ weight.astype(np.float64)
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("engine", ["ort-cpu", "openvino-cpu"])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_int4_weights_are_exact(tmp_path: Path, sign: int, engine: str) -> None:
    """Activations are codes of one block's step, weights whole numbers to -8, of one sign."""
    if engine == "openvino-cpu":
        pytest.importorskip("openvino", reason="openvino is not installed")
    rng = np.random.default_rng(0)
    values = large(rng, 24, WIDTH)
    weight = -rng.integers(5, 9, (WIDTH, COLUMNS)).astype(np.float32) * sign
    values[:, ::BLOCK], weight[::BLOCK] = CODES, -8 * sign
    opened = open_graph(quantised(tmp_path, "int4 weights", weight, Range()), engine, 1)
    found = opened.run({"x": opened.put(values)})["y"].numpy()
    want = values.astype(np.float64) @ weight.astype(np.float64)
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()
