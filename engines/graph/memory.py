"""How much memory one graph needs, told from its file: weights, and an upper bound of its tensors."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vtp.engines.errors import VtpError
from vtp.engines.graph.file import GraphFile, Node, TensorShape, read_graph, size_of

# Operators for which ONNX Runtime's CPU provider holds a float32 row of scores for every query.
_SCORED = ("Attention", "GroupQueryAttention", "MultiHeadAttention")
# Inputs and outputs that go from run to run: keys and values, and states such as past_conv.3, present_conv.3.
_CARRIED = re.compile(r"past_\w+\.|present(_\w+)?\.")


@dataclass(frozen=True)
class GraphMemory:
    """Bytes of one graph.

    weights      as stored, with those that lie in another graph's file
    activations  most that its tensors take at once: inputs, inner tensors and outputs without the KV cache,
                 each freed after its last use, nothing computed in place
    scores       float32 attention scores of the largest attention node, where the engine materialises them
    unknown      inner tensors of a shape that the file does not tell; they are not counted
    """

    weights: int
    activations: int
    scores: int
    unknown: int


def graph_memory(path: str | Path, axes: Mapping[str, int]) -> GraphMemory:
    """Memory of a graph whose dynamic axes have the sizes `axes`, by name."""
    graph = read_graph(path)
    weights = sum(weight.bytes for weight in graph.weights.values())
    sizes, unknown = _sizes(graph, axes)
    return GraphMemory(weights, _peak(graph, sizes), _scores(graph, axes), unknown)


def _sizes(graph: GraphFile, axes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Bytes of every tensor that is neither weight nor cache; how many could not be told."""
    sizes: dict[str, int] = {}
    unknown = 0
    made = [name for node in graph.nodes for name in node.outputs if name]
    for name in [*graph.inputs, *made]:
        if _CARRIED.match(name):
            continue
        shape = _shape(graph.tensors.get(name), axes)
        if shape is None:
            unknown += 1
        else:
            sizes[name] = size_of(graph.tensors[name].dtype, shape)
    return sizes, unknown


def _peak(graph: GraphFile, sizes: Mapping[str, int]) -> int:
    """Walk the nodes in order, freeing every tensor after its last use."""
    last = {name: place for place, node in enumerate(graph.nodes) for name in node.inputs}
    held = {*graph.inputs, *graph.outputs}
    now = peak = sum(sizes.get(name, 0) for name in graph.inputs)
    for place, node in enumerate(graph.nodes):
        now += sum(sizes.get(name, 0) for name in node.outputs)
        peak = max(peak, now)
        for name in {*node.inputs, *node.outputs} - held:
            if last.get(name, place) == place:
                now -= sizes.get(name, 0)
    return peak


def _scores(graph: GraphFile, axes: Mapping[str, int]) -> int:
    return max((_scores_of(graph, node, axes) for node in graph.nodes if node.op in _SCORED), default=0)


def _scores_of(graph: GraphFile, node: Node, axes: Mapping[str, int]) -> int:
    """B x heads x queries x keys x 4 bytes."""
    query = _shape(graph.tensors.get(node.inputs[0]), axes)
    key = _shape(graph.tensors.get(node.inputs[1]), axes)
    if query is None or key is None:
        return 0
    heads = node.ints.get("num_heads") or node.ints.get("q_num_heads") or query[1]
    keys = key[-2]
    if node.op == "GroupQueryAttention":  # a query looks at the whole cache
        past = _shape(graph.tensors.get(node.inputs[3]), axes)
        keys = past[2] if past else keys
    return query[0] * heads * query[-2] * keys * 4


def _shape(tensor: TensorShape | None, axes: Mapping[str, int]) -> tuple[int, ...] | None:
    """A shape in numbers; None where an axis is not made of `axes`."""
    if tensor is None:
        return None
    try:
        return tuple(axis if isinstance(axis, int) else max(0, evaluate(axis, axes)) for axis in tensor.shape)
    except VtpError:
        return None


def evaluate(expression: str, axes: Mapping[str, int]) -> int:
    """The value of an axis such as "batch*(text + visual - 1)". VtpError for anything else."""
    try:
        return _value(ast.parse(expression, mode="eval").body, axes)
    except (SyntaxError, ZeroDivisionError, RecursionError) as error:
        raise VtpError(f"axis '{expression}' is not an expression of axes") from error


def _value(node: ast.expr, axes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name) and node.id in axes:
        return axes[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, axes)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, axes), _value(node.right, axes)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.FloorDiv):
            return left // right
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Max", "Min"):
        values = [_value(argument, axes) for argument in node.args]
        return max(values) if node.func.id == "Max" else min(values)
    raise VtpError(f"axis '{ast.unparse(node)}' is not an expression of {', '.join(axes) or 'axes'}")
