"""What TensorRT 10.3's ONNX parser takes, as published: operators, the dtypes of their data, restrictions.

From docs/operators.md of onnx-tensorrt at 10.1, and its changelog: 10.2 and 10.3 added no operator and no
dtype, 10.3 took axes that are tensors in Slice. Only what says yes there is listed; operators that graphs of
this house never hold are left out. The parser takes more than it publishes: tests hold graphs to the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto

OPSETS = range(9, 21)
TOP_K = 3840  # most that TopK gives

_FLOATS = {"FLOAT", "FLOAT16", "BFLOAT16"}
_NUMBERS = _FLOATS | {"INT32", "INT64"}
_TRUTHS = {"BOOL"}
_ALL = _NUMBERS | _TRUTHS


def _each(names: str, kinds: set[str]) -> dict[str, set[str]]:
    return dict.fromkeys(names.split(), kinds)


OPERATORS: dict[str, set[str]] = {
    **_each(
        "Abs Add ArgMax ArgMin Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul Neg "
        "Range ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu "
        "ScatterElements ScatterND Sign Sub Sum TopK Pad",
        _NUMBERS,
    ),
    **_each(
        "AveragePool BatchNormalization Ceil Clip Conv ConvTranspose Cos CumSum Einsum Elu Erf Exp Floor "
        "Gemm HardSigmoid HardSwish IsInf LayerNormalization Log LogSoftmax MatMul Pow Reciprocal Resize "
        "Round Sigmoid Sin Softmax Softplus Sqrt Tan Tanh",
        _FLOATS,
    ),
    **_each(
        "Concat Constant Expand Flatten Gather GatherElements GatherND Identity OneHot Reshape Shape Slice "
        "Split Squeeze Tile Transpose Trilu Unsqueeze Where",
        _ALL,
    ),
    **_each("And Not Or Xor", _TRUTHS),
    "Cast": _ALL | {"UINT8"},
    "ConstantOfShape": {"FLOAT"},
    "DequantizeLinear": {"INT8", "FLOAT8E4M3FN", "INT4"},
    "Gelu": _NUMBERS | {"INT8"},
    "QuantizeLinear": _FLOATS,
}
# Operators with an input (its place) that must be a constant of the graph.
_CONSTANT = {"Squeeze": 1, "Unsqueeze": 1, "CumSum": 1, "Pad": 3, "OneHot": 1}
_CONSTANT |= dict.fromkeys((name for name in OPERATORS if name.startswith("Reduce")), 1)
# The input whose dtype is the node's, where it is not the first.
_DATA = {"Where": 1, "OneHot": 2}


@dataclass(frozen=True)
class _Known:
    """A graph's dtypes by tensor name, and which of its tensors are constants."""

    kinds: dict[str, str]
    constants: set[str]
    values: dict[str, TensorProto]


def refused(path: Path) -> list[str]:
    """What of a graph file is not in the list: one line each, empty where TensorRT 10.3 should take it."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    lines = [
        f"opset {item.version} of domain '{item.domain}'"
        for item in model.opset_import
        if item.domain or item.version not in OPSETS
    ]
    known = _known(model.graph)
    for node in model.graph.node:
        lines += [f"{path.name}: {node.op_type} {node.name}: {why}" for why in _problems(node, known)]
    return lines


def _known(graph: onnx.GraphProto) -> _Known:
    kinds = {
        item.name: TensorProto.DataType.Name(item.type.tensor_type.elem_type)
        for item in (*graph.input, *graph.output, *graph.value_info)
    }
    weights = {item.name: item for item in graph.initializer}
    kinds |= {name: TensorProto.DataType.Name(item.data_type) for name, item in weights.items()}
    made = {node.output[0] for node in graph.node if node.op_type == "Constant"}
    return _Known(kinds, made | set(weights), weights)


def _problems(node: NodeProto, known: _Known) -> list[str]:
    if node.domain or node.op_type not in OPERATORS:
        return ["no such operator"]
    kinds, found = OPERATORS[node.op_type], []
    if node.op_type in ("Constant", "ConstantOfShape"):
        named = {item.name: item for item in node.attribute}
        seen = {
            TensorProto.DataType.Name(item.t.data_type) for name, item in named.items() if name == "value"
        }
    else:
        seen = {known.kinds.get(node.input[_DATA.get(node.op_type, 0)], "unknown")}
    if node.op_type == "Cast":
        seen.add(TensorProto.DataType.Name(node.attribute[0].i))
    found += [f"dtype {kind}" for kind in sorted(seen - kinds)]
    place = _CONSTANT.get(node.op_type, len(node.input))
    if place < len(node.input) and node.input[place] and node.input[place] not in known.constants:
        found.append(f"input {place} is no constant")
    return found + _attribute_problems(node, known)


def _attribute_problems(node: NodeProto, known: _Known) -> list[str]:
    found = []
    if node.op_type == "TopK":
        given = known.values.get(node.input[1])
        most = int(onnx.numpy_helper.to_array(given).max()) if given is not None else TOP_K + 1
        if most > TOP_K:
            found.append(f"K {most}" if given is not None else "K is no constant")
    for attribute in node.attribute:
        if attribute.name == "reduction" and attribute.s not in (b"", b"none"):
            found.append("with a reduction")
    return found
