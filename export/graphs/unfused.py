"""Products in float64 that every ONNX Runtime opens."""

from __future__ import annotations

import onnx_ir as ir

_FUSED = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)  # FusedMatMul has kernels for these


def keep_transposes(model: ir.Model) -> None:
    """Part every Transpose from the float64 MatMul that reads it by a Reshape to the same shape; in place.

    ONNX Runtime before 1.26 makes one FusedMatMul of the two, which has no kernel in float64: the graph does
    not open. A Reshape moves no data.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type == "MatMul" and node.outputs[0].dtype not in _FUSED:
            for place, value in enumerate(node.inputs):
                transpose = _transpose(value)
                if value is not None and transpose is not None:
                    node.replace_input_with(place, _reshaped(node, value, transpose, place))


def _transpose(value: ir.Value | None) -> ir.Node | None:
    """The Transpose that makes a value, seen through Cast, which ONNX Runtime moves."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Cast":
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return node if node is not None and node.op_type == "Transpose" else None


def _reshaped(reader: ir.Node, value: ir.Value, transpose: ir.Node, place: int) -> ir.Value:
    name = f"{reader.name}/input_{place}"
    kept = ir.tensor([0] * _rank(value, transpose), ir.DataType.INT64, name=f"{name}/shape")  # 0: as it is
    shape = ir.node("Constant", [], {"value": kept}, name=f"{name}/shape")
    reshape = ir.node("Reshape", [value, shape.outputs[0]], name=name)
    for node in (shape, reshape):
        node.outputs[0].name = f"{node.name}/output"
    result = reshape.outputs[0]
    result.type, result.shape = value.type, value.shape
    assert reader.graph is not None  # it was found in one
    reader.graph.insert_before(reader, [shape, reshape])
    return result


def _rank(value: ir.Value, transpose: ir.Node) -> int:
    if value.shape is not None:
        return len(value.shape)
    return len(transpose.attributes["perm"].as_ints())
