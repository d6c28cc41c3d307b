"""What older engines want of a traced graph, beside its opset."""

from __future__ import annotations

import onnx_ir as ir

OPSET = 20  # the newest that TensorRT 10.3 reads
_IR_VERSION = 9  # of the ONNX that brought it: what ONNX Runtime 1.17 reads


def lower(model: ir.Model, opset: int) -> None:
    """Write Clip of integers as Max and Min in a graph for OPSET or older; in place.

    TensorRT 10.3's parser takes them, its published list of operators does not name them. The file says the
    IR version of that time, so that an ONNX Runtime of that time opens it.
    """
    if opset > OPSET:
        return
    model.ir_version = _IR_VERSION
    for node in list(model.graph):
        value = node.inputs[0] if node.op_type == "Clip" else None
        if value is not None and value.dtype is not None and value.dtype.is_integer():
            _clip_by_elements(model.graph, node)


def _clip_by_elements(graph: ir.Graph, clip: ir.Node) -> None:
    nodes: list[ir.Node] = []
    value, *bounds = clip.inputs
    for operator, bound in zip(("Max", "Min"), bounds, strict=False):
        if bound is not None:
            nodes.append(ir.node(operator, [value, bound], name=f"{clip.name}/{operator}"))
            value = nodes[-1].outputs[0]
    assert value is not None  # Clip's first input is not optional
    ir.convenience.replace_nodes_and_values(graph, clip, [clip], nodes, clip.outputs, [value])
