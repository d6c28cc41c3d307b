"""Floating-point operations of a graph, counted from its file, and the bytes of weights that a run must read.

Counted are matrix products, convolutions and attention, a multiply-add as two operations; everything else is
less than a percent in a transformer. Causal attention counts only what a token may look at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vtp.engines.errors import VtpError
from vtp.engines.graph.file import GraphFile, Node, read_graph
from vtp.engines.graph.memory import evaluate

Shape = tuple[int, ...]
# Operators that hand a weight on under another name: quantised weights and transposed ones.
_PASSING = ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity", "Transpose", "Reshape")


@dataclass(frozen=True)
class Work:
    """What one run of a graph does.

    flops     operations, by operator
    weights   bytes of the weights that counted operators read, each once
    unknown   counted operators whose shapes the file does not tell; their work is missing from `flops`
    """

    flops: dict[str, int]
    weights: int
    unknown: int

    @property
    def total(self) -> int:
        """All operators together."""
        return sum(self.flops.values())


class _Counter:
    def __init__(self, graph: GraphFile, axes: Mapping[str, int], past: int) -> None:
        self.graph = graph
        self.axes = axes
        self.past = past
        self.maker = {name: node for node in graph.nodes for name in node.outputs if name}

    def shape(self, name: str) -> Shape:
        """A tensor's shape in numbers; VtpError where the file does not tell it."""
        if name in self.graph.weights:
            return self.graph.weights[name].shape
        if name in self.graph.tensors:
            axes = self.graph.tensors[name].shape
            return tuple(axis if isinstance(axis, int) else evaluate(axis, self.axes) for axis in axes)
        node = self.maker.get(name)
        if node is not None and node.op in ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity"):
            return self.shape(node.inputs[0])
        raise VtpError(f"the shape of '{name}' is not told")

    def weight_of(self, name: str) -> str | None:
        """The weight behind an input, through what only hands it on."""
        while name not in self.graph.weights:
            node = self.maker.get(name)
            if node is None or node.op not in _PASSING or not node.inputs:
                return None
            name = node.inputs[0]
        return name


def count(path: str | Path, axes: Mapping[str, int], past: int = 0) -> Work:
    """Count one run of the graph at `path`.

    axes   sizes of its named axes
    past   tokens that a decoder's cache held before this run

    Raises VtpError for a file that is not a graph.
    """
    counter = _Counter(read_graph(path), axes, past)
    flops: dict[str, int] = {}
    read: set[str] = set()
    unknown = 0
    for node in counter.graph.nodes:
        rule = _RULES.get(node.op)
        if rule is None:
            continue
        found = [counter.weight_of(name) for name in node.inputs if name]
        read |= {name for name in found if name}
        try:
            flops[node.op] = flops.get(node.op, 0) + rule(counter, node)
        except (VtpError, IndexError):
            unknown += 1
    weights = _distinct(counter.graph, read)
    return Work(flops, weights, unknown)


def _distinct(graph: GraphFile, names: set[str]) -> int:
    """Bytes of weights, those that lie in the same place of external data once."""
    seen = {graph.weights[name].place or name: graph.weights[name].bytes for name in names}
    return sum(seen.values())


def _product(left: Shape, right: Shape) -> int:
    """MatMul with numpy's broadcasting: 2 x batch x rows x inner x columns."""
    rows = left[-2] if len(left) > 1 else 1
    columns = right[-1] if len(right) > 1 else 1
    ahead = zip(_padded(left[:-2], right[:-2]), _padded(right[:-2], left[:-2]), strict=True)
    batch = math.prod(max(pair) for pair in ahead)
    return 2 * batch * rows * left[-1] * columns


def _padded(shape: Shape, other: Shape) -> Shape:
    return (1,) * (len(other) - len(shape)) + shape


def _matmul(first: int, second: int) -> Callable[[_Counter, Node], int]:
    return lambda counter, node: _product(
        counter.shape(node.inputs[first]), counter.shape(node.inputs[second])
    )


def _gemm(counter: _Counter, node: Node) -> int:
    left, right = counter.shape(node.inputs[0]), counter.shape(node.inputs[1])
    left = left[::-1] if node.ints.get("transA") else left
    return _product(left, right[::-1] if node.ints.get("transB") else right)


def _conv(weight: int) -> Callable[[_Counter, Node], int]:
    """2 x outputs x inputs per group x kernel."""
    return lambda counter, node: (
        2 * math.prod(counter.shape(node.outputs[0])) * math.prod(counter.shape(node.inputs[weight])[1:])
    )


def _quantised_matmul(counter: _Counter, node: Node) -> int:
    """MatMulNBits: K and N are attributes."""
    rows = math.prod(counter.shape(node.inputs[0])[:-1])
    return 2 * rows * node.ints["K"] * node.ints["N"]


def _attention(counter: _Counter, node: Node) -> int:
    """ONNX's Attention and ONNX Runtime's MultiHeadAttention: [B,H,S,d], or [B,S,H*d] with equal heads."""
    query, key, value = (counter.shape(name) for name in node.inputs[:3])
    rows, keys = query[-2], key[-2]
    lines = math.prod(query[:-2])  # batch, and heads where they are an axis of their own
    seen = rows * keys
    if node.ints.get("is_causal") or node.ints.get("unidirectional"):
        seen = rows * (keys - rows) + rows * (rows + 1) // 2
    return 2 * lines * seen * (query[-1] + (value[-1] if len(query) == 4 else query[-1]))


def _grouped_attention(counter: _Counter, node: Node) -> int:
    """GroupQueryAttention: a token looks at the cache, and at the tokens up to itself or all of them."""
    batch, rows, width = counter.shape(node.inputs[0])
    if not node.inputs[1]:  # query, key and value in one tensor
        heads, groups = node.ints["num_heads"], node.ints["kv_num_heads"]
        width = width * heads // (heads + 2 * groups)
    own = rows * (rows + 1) // 2 if node.ints.get("causal", 1) else rows * rows
    return 4 * batch * width * (rows * counter.past + own)


_RULES: dict[str, Callable[[_Counter, Node], int]] = {
    "MatMul": _matmul(0, 1),
    "FusedMatMul": _matmul(0, 1),
    "MatMulInteger": _matmul(0, 1),
    "MatMulIntegerToFloat": _matmul(0, 1),
    "QLinearMatMul": _matmul(0, 3),
    "Gemm": _gemm,
    "Conv": _conv(1),
    "FusedConv": _conv(1),
    "ConvInteger": _conv(1),
    "QLinearConv": _conv(3),
    "MatMulNBits": _quantised_matmul,
    "Attention": _attention,
    "MultiHeadAttention": _attention,
    "GroupQueryAttention": _grouped_attention,
}
