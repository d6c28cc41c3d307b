"""Fewer bits: ranges, codes and their packing, held against brute force and ONNX Runtime's operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from vtp.calib.quantize.rounding import (
    INT8,
    Blocks,
    Range,
    decibels,
    int4_blocks,
    int8_channels,
    nearest_blocks,
)


def rounded(values: np.ndarray, step: float) -> np.ndarray:
    return np.clip(np.rint(values / step), -INT8, INT8) * step


def plain(weight: np.ndarray, block: int) -> np.ndarray:
    """Round-to-nearest int4 with the largest weight of every block at code 7."""
    parts = weight.T.reshape(weight.shape[1], -1, block)
    step = np.abs(parts).max(-1, keepdims=True) / 7
    return (np.rint(parts / step) * step).reshape(weight.shape[1], -1).T


@given(st.integers(0, 10**6), st.sampled_from([0.0, 30.0, 1000.0]))
@settings(max_examples=30, deadline=None)
def test_a_range_loses_no_more_than_the_whole_one(seed: int, outlier: float) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(20_000) * 10.0 ** rng.integers(-4, 4)).astype(np.float32)
    values[0] *= outlier
    seen = Range()
    for part in np.array_split(values, 7):
        seen.add(part)
    whole = np.abs(values).max() / INT8
    error, least = (np.square(values - rounded(values, step)).sum() for step in (seen.scale(), whole))
    assert error <= least * 1.1
    assert seen.counts.sum() == values.size and seen.top == np.abs(values).max()


def test_a_range_grows_without_forgetting_and_takes_zeros() -> None:
    seen = Range()
    seen.add(np.zeros(5))
    assert seen.scale() == 1.0
    seen.add(np.linspace(0, 1, 1000))
    before = seen.scale()
    seen.add(np.full(3, 700.0))
    assert seen.limit >= 700 and seen.counts.sum() == 1008
    assert seen.scale() > before
    assert len(seen.counts) == len(Range().counts)


def test_int8_is_within_half_a_step_of_every_channel() -> None:
    weight = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32) * np.logspace(-3, 3, 12)
    weight[:, 3] = 0
    codes, scale = int8_channels(weight.astype(np.float32))
    assert codes.dtype == np.int8 and np.abs(codes).max() == INT8
    assert (np.abs(codes * scale - weight) <= scale * 0.5001).all()


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("rows", "block"), [(64, 32), (128, 64), (100, 32)])
def test_int4_beats_rounding_to_nearest(rows: int, block: int, positive: bool) -> None:
    rng = np.random.default_rng(rows)
    weight = rng.standard_normal((rows, 24)).astype(np.float32)
    energy = rng.uniform(0.01, 10, rows).astype(np.float32)
    blocks = int4_blocks(weight, energy, block, "float32", positive)
    assert blocks.codes.shape == (24, -(-rows // block), block) and blocks.codes.max() <= 15
    assert not positive or (blocks.scales > 0).all()
    if rows % block == 0:
        error, simple = (
            energy @ np.square(weight - one) for one in (blocks.weight(rows), plain(weight, block))
        )
        assert error.sum() < 0.85 * simple.sum()


def test_int4_spends_its_codes_where_the_inputs_are_loud() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((32, 50)).astype(np.float32)
    energy = np.where(np.arange(32) < 8, 100.0, 0.01).astype(np.float32)
    even = np.square(weight - int4_blocks(weight, np.ones(32), 32, "float32", False).weight(32))
    loud = np.square(weight - int4_blocks(weight, energy, 32, "float32", False).weight(32))
    assert loud[:8].sum() < 0.8 * even[:8].sum()


def test_an_empty_block_stays_zero() -> None:
    blocks = int4_blocks(np.zeros((32, 2), np.float32), np.zeros(32, np.float32), 32, "float16", True)
    assert not blocks.weight(32).any() and (blocks.scales > 0).all()


def run(node: onnx.NodeProto, inputs: dict[str, Any], weights: list[onnx.TensorProto], width: int) -> Any:
    """What ONNX Runtime makes of a node, without its optimisations."""
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in inputs.items()
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, width])
    graph = helper.make_graph([node], "one", infos, [out], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0]


def made(rows: int, positive: bool) -> tuple[np.ndarray, Blocks]:
    weight = np.random.default_rng(5).standard_normal((rows, 16)).astype(np.float32)
    return weight, int4_blocks(weight, np.ones(rows), 32, "float32", positive)


@pytest.mark.parametrize("rows", [64, 80])
def test_matmulnbits_reads_the_packed_codes(rows: int) -> None:
    _, blocks = made(rows, False)
    packed = helper.make_tensor(
        "b", TensorProto.UINT8, blocks.packed().shape, blocks.packed().tobytes(), True
    )
    scales = onnx.numpy_helper.from_array(blocks.scales.reshape(-1), "s")
    options = {"K": rows, "N": 16, "bits": 4, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", **options)
    rows_in = np.random.default_rng(6).standard_normal((3, rows)).astype(np.float32)
    np.testing.assert_allclose(
        run(node, {"x": rows_in}, [packed, scales], 16), rows_in @ blocks.weight(rows), atol=1e-4
    )


def test_dequantizelinear_reads_the_packed_tensor() -> None:
    _, blocks = made(64, True)
    codes = helper.make_tensor("b", TensorProto.INT4, [64, 16], blocks.packed_tensor().tobytes(), True)
    scales = onnx.numpy_helper.from_array(np.ascontiguousarray(blocks.scales.T), "s")
    node = helper.make_node("DequantizeLinear", ["b", "s"], ["y"], axis=0, block_size=32)
    np.testing.assert_array_equal(run(node, {}, [codes, scales], 16), blocks.weight(64))


def test_decibels() -> None:
    assert decibels(100, 1) == pytest.approx(20)
    assert decibels(1, 0) == decibels(0, 0) == 120
    assert decibels(0, 1) < -200
    assert decibels(1, 100) == pytest.approx(-20)


@pytest.mark.parametrize("rows", [32, 96])
def test_plain_rounding_is_that_of_onnx_runtimes_quantiser(rows: int) -> None:
    """The codes that onnxruntime-genai's builder gets: so both decoders hold the same weights."""
    quantiser = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    weight = np.random.default_rng(rows).standard_normal((rows, 40)).astype(np.float32)
    weight[:32, 3] = 0
    config = quantiser.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True)
    packed, scales, _ = quantiser.DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight)
    found = nearest_blocks(weight, 32, "float32")
    np.testing.assert_array_equal(found.packed(), packed)
    np.testing.assert_array_equal(found.scales.ravel(), scales.ravel())


@given(
    st.lists(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=8), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_parts_of_a_range_merge_in_any_order(parts: list[list[float]], random: Any) -> None:
    """One pass over all values, and parts merged in any order: the same histogram, bin by bin."""
    whole, merged = Range(), Range()
    whole.add(np.array([value for part in parts for value in part], np.float32))
    random.shuffle(parts)
    for part in parts:
        one = Range()
        one.add(np.array(part, np.float32))
        merged.merge(one)
    assert (merged.limit, merged.top) == (whole.limit, whole.top)
    assert np.array_equal(merged.counts, whole.counts) and whole.counts.sum() == sum(map(len, parts))
    assert merged.scale() == whole.scale()
