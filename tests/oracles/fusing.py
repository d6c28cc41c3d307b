"""What ONNX Runtime before 1.26 cannot open, read from a graph's file."""

from __future__ import annotations

from pathlib import Path

import onnx


def fused_in_float64(path: Path) -> list[str]:
    """Names of the float64 MatMuls that MatmulTransposeFusion would take, and that so have no kernel.

    It takes a product one of whose inputs is made by Transpose, also where a Cast lies between.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    graph = model.graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for values in (graph.value_info, graph.input, graph.output)
        for value in values
    }
    maker = {name: node for node in graph.node for name in node.output}

    def transposed(name: str) -> bool:
        node = maker.get(name)
        while node is not None and node.op_type == "Cast":
            node = maker.get(node.input[0])
        return node is not None and node.op_type == "Transpose"

    products = [node for node in graph.node if node.op_type == "MatMul"]
    assert all(types.get(node.output[0]) for node in products), "a product's type is not told"
    double = onnx.TensorProto.DOUBLE
    exact = [node for node in products if types[node.output[0]] == double]
    return [node.name for node in exact if any(map(transposed, node.input))]
