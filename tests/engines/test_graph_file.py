"""The small reader of graph files says what the onnx package says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from vtp.engines.errors import VtpError
from vtp.engines.graph.file import read_graph, size_of


def shape_of(item: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(axis.dim_param or axis.dim_value for axis in item.type.tensor_type.shape.dim)


@pytest.mark.parametrize("bundle", ["adaptprune", "float16"])
def test_every_graph_of_a_bundle_is_read_alike(exported: Callable[[str], Any], bundle: str) -> None:
    for path in sorted(exported(bundle).folder.glob("*.onnx")):
        model, found = onnx.load(path), read_graph(path)
        graph = model.graph
        assert found.opsets == {item.domain: item.version for item in model.opset_import}
        assert found.inputs == tuple(item.name for item in graph.input)
        assert found.outputs == tuple(item.name for item in graph.output)
        values = [*graph.input, *graph.output, *graph.value_info]
        assert {name: one.shape for name, one in found.tensors.items()} == {
            item.name: shape_of(item) for item in values if item.type.tensor_type.HasField("shape")
        }
        for node, wanted in zip(found.nodes, graph.node, strict=True):
            assert (node.op, node.domain, node.name) == (wanted.op_type, wanted.domain, wanted.name)
            assert (node.inputs, node.outputs) == (tuple(wanted.input), tuple(wanted.output))
            assert node.ints == {one.name: one.i for one in wanted.attribute if one.type == one.INT}
        for item in graph.initializer:
            array = onnx.numpy_helper.to_array(item)
            weight = found.weights[item.name]
            assert (weight.shape, weight.dtype, weight.bytes) == (array.shape, array.dtype.name, array.nbytes)
        outside = [item.place[0] for item in found.weights.values() if item.place]
        assert all((path.parent / name).is_file() for name in outside)


def test_inner_shapes_are_said_in_the_names_of_the_inputs(exported: Callable[[str], Any]) -> None:
    graph = read_graph(exported("adaptprune").folder / "decoder_head.onnx")
    axes = {axis for tensor in graph.tensors.values() for axis in tensor.shape if isinstance(axis, str)}
    assert {"batch", "sequence"} <= axes <= {"batch", "sequence", "capacity", "batch*sequence"}


def test_four_bit_weights_take_half_a_byte() -> None:
    assert size_of("int4", (3, 3)) == 5
    assert size_of("float16", (3, 3)) == 18


@pytest.mark.parametrize("content", [b"", b"garbage" * 40, bytes(64), b"\x3a\xff\x01ab"])
def test_what_is_no_graph_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(VtpError, match="is not an ONNX graph"):
        read_graph(tmp_path / "g.onnx")
    with pytest.raises(VtpError, match="cannot read"):
        read_graph(tmp_path / "missing.onnx")
