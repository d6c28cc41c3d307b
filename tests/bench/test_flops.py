"""`vtp.bench.common.flops`: operations of graphs whose number is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vtp.bench.common.flops import count
from vtp.engines import VtpError

FLOAT = TensorProto.FLOAT


def write(
    path: Path, nodes: list[Any], inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], **weights: Any
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph), path)
    return path


def test_matmul_counts_a_multiply_add_as_two(tmp_path: Path) -> None:
    weight = np.zeros((5, 7), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = write(tmp_path / "g.onnx", [node], {"x": ["batch", 3, 5]}, {"y": ["batch", 3, 7]}, w=weight)
    work = count(path, {"batch": 2})
    assert work.flops == {"MatMul": 2 * 2 * 3 * 5 * 7}
    assert work.weights == weight.nbytes and work.unknown == 0


def test_matmul_broadcasts_its_batch(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "z"], ["y"])
    shapes = {"x": [4, 1, 3, 5], "z": [6, 5, 7]}
    path = write(tmp_path / "g.onnx", [node], shapes, {"y": [4, 6, 3, 7]})
    assert count(path, {}).total == 2 * 4 * 6 * 3 * 5 * 7


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm_reads_its_transposes(tmp_path: Path, left: int, right: int) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transA=left, transB=right)
    weight = np.zeros((7, 5) if right else (5, 7), np.float32)
    path = write(tmp_path / "g.onnx", [node], {"x": [5, 3] if left else [3, 5]}, {"y": [3, 7]}, w=weight)
    assert count(path, {}).flops == {"Gemm": 2 * 3 * 5 * 7}


def test_convolution(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[14, 14], strides=[14, 14])
    weight = np.zeros((8, 3, 14, 14), np.float32)
    path = write(tmp_path / "g.onnx", [node], {"x": [1, 3, 56, 56]}, {"y": [1, 8, 4, 4]}, w=weight)
    assert count(path, {}).flops == {"Conv": 2 * 8 * 4 * 4 * 3 * 14 * 14}


@pytest.mark.parametrize("causal", [0, 1])
def test_attention_of_four_axes(tmp_path: Path, causal: int) -> None:
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=causal)
    shapes = {"q": [2, 3, 5, 8], "k": [2, 3, 5, 8], "v": [2, 3, 5, 8]}
    path = write(tmp_path / "g.onnx", [node], shapes, {"y": [2, 3, 5, 8]})
    seen = 5 * 6 // 2 if causal else 25
    assert count(path, {}).total == 2 * 2 * 3 * seen * (8 + 8)


def grouped(past: str = "capacity", causal: int = 1) -> tuple[Any, dict[str, list[Any]]]:
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "pk", "pv", "s", "t"],
        ["y", "nk", "nv"],
        domain="com.microsoft",
        num_heads=4,
        kv_num_heads=2,
        causal=causal,
    )
    shapes: dict[str, list[Any]] = {"q": [1, "sequence", 32], "k": [1, "sequence", 16]}
    shapes |= {"v": [1, "sequence", 16], "pk": [1, 2, past, 8], "pv": [1, 2, past, 8], "s": [1], "t": []}
    return node, shapes


@pytest.mark.parametrize(("sequence", "past"), [(5, 0), (1, 9), (3, 4)])
def test_grouped_attention_looks_back_and_no_further(tmp_path: Path, sequence: int, past: int) -> None:
    node, shapes = grouped()
    path = write(tmp_path / "g.onnx", [node], shapes, {"y": [1, "sequence", 32]})
    looked_at = sum(past + row + 1 for row in range(sequence))
    work = count(path, {"sequence": sequence, "capacity": 64}, past)
    assert work.flops == {"GroupQueryAttention": 2 * 2 * 4 * 8 * looked_at}


def test_under_a_mask_grouped_attention_looks_at_all(tmp_path: Path) -> None:
    node, shapes = grouped(causal=0)
    path = write(tmp_path / "g.onnx", [node], shapes, {"y": [1, "sequence", 32]})
    assert count(path, {"sequence": 3, "capacity": 64}, 4).total == 2 * 2 * 4 * 8 * 3 * (4 + 3)


def test_four_bit_products_have_their_sizes_as_attributes(tmp_path: Path) -> None:
    packed = np.zeros((6, 2, 8), np.uint8)
    node = helper.make_node(
        "MatMulNBits", ["x", "w"], ["y"], domain="com.microsoft", K=32, N=6, bits=4, block_size=16
    )
    path = write(tmp_path / "g.onnx", [node], {"x": [1, "sequence", 32]}, {"y": [1, "sequence", 6]}, w=packed)
    work = count(path, {"sequence": 3})
    assert work.flops == {"MatMulNBits": 2 * 3 * 32 * 6} and work.weights == packed.nbytes


def test_a_quantised_weight_is_found_behind_its_scale(tmp_path: Path) -> None:
    weight = np.zeros((5, 7), np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["wide"]),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    scale = np.ones((), np.float32)
    path = write(tmp_path / "g.onnx", nodes, {"x": [3, 5]}, {"y": [3, 7]}, w=weight, scale=scale)
    work = count(path, {})
    assert work.total == 2 * 3 * 5 * 7 and work.weights == weight.nbytes


def test_quantised_products_read_the_right_inputs(tmp_path: Path) -> None:
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    node = helper.make_node("QLinearMatMul", names, ["y"])
    one = np.ones((), np.float32)
    zero = np.zeros((), np.int8)
    given = {
        "w": np.zeros((5, 7), np.int8),
        "xs": one,
        "ws": one,
        "ys": one,
        "xz": zero,
        "wz": zero,
        "yz": zero,
    }
    path = write(tmp_path / "g.onnx", [node], {"x": [3, 5]}, {"y": [3, 7]}, **given)
    assert count(path, {}).flops == {"QLinearMatMul": 2 * 3 * 5 * 7}


def test_what_cannot_be_told_is_counted_as_unknown(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["hidden"]),  # its shape is nowhere
        helper.make_node("MatMul", ["hidden", "w"], ["y"]),
    ]
    weight = np.zeros((5, 7), np.float32)
    path = write(tmp_path / "g.onnx", nodes, {"x": [3, 5]}, {"y": [3, 7]}, w=weight)
    work = count(path, {})
    assert work.unknown == 1 and work.total == 0 and work.weights == weight.nbytes


def test_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(VtpError, match="not an ONNX graph"):
        count(tmp_path / "g.onnx", {})


def test_an_encoder_has_the_operations_of_its_configuration(exported: Any) -> None:
    """The tiny tower: 56 pixels, patches of 14, width 32, twice as wide inside, 2 of its 3 layers needed."""
    work = count(exported("none").folder / "vision_encoder.onnx", {"batch": 1})
    tokens, width, layers = 17, 32, 2
    products = layers * (4 * tokens * width * width + 2 * tokens * width * 2 * width)
    attention = layers * 2 * tokens * tokens * width
    patches = 16 * width * 3 * 14 * 14
    assert work.total == 2 * (products + attention + patches) and work.unknown == 0
