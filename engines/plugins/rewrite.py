"""Finds an unrolled greedy selection in a graph file, and puts one node of ours in its place.

Works on the file's bytes, without the onnx package: the device that builds engines has none. Everything else
in the graph stays as it was, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vtp.engines.errors import VtpError
from vtp.engines.graph.file import GraphFile, Node, fields, read_graph

DOMAIN, OPERATOR = "vtp", "greedy"
_GONE = b"\x00\x00\x80\xff"  # -inf in float32
_STRING, _INTS = 3, 7  # AttributeProto.type

_NOTHING = Node("", "", "", (), ())

Makers = Mapping[str, Node]  # tensor name -> the node that gives it


@dataclass(frozen=True)
class Greedy:
    """A greedy selection of `keep` among `count` tokens, by the names of its tensors.

    scores [B,count] and factors [B,count,count] float32 -> picks [B,keep] int64, in order of picking.
    """

    scores: str
    factors: str
    picks: str
    count: int
    keep: int


def find_greedy(path: str | Path) -> Greedy | None:
    """The greedy selection of a graph file; None if it has none. VtpError if the file is not a graph."""
    return _find(read_graph(path))


def with_greedy_node(path: str | Path) -> tuple[bytes, Greedy]:
    """The graph file with its greedy selection as one node `vtp::greedy`, and what that was.

    Weights in external data stay where they are: the content belongs beside them.
    Raises VtpError where there is no such selection.
    """
    graph = read_graph(path)
    found = _find(graph)
    if found is None:
        raise VtpError(f"{Path(path).name} has no greedy selection that the plugin could take the place of")
    content = b""
    for number, value in fields(Path(path).read_bytes()):
        if number == 7 and isinstance(value, bytes):  # the graph
            value = _with_node(value, graph, found)
        content += _field(number, value)
    return content + _field(8, _field(1, DOMAIN.encode()) + _field(2, 1)), found


# -- finding -------------------------------------------------------------------------------------------------


def _find(graph: GraphFile) -> Greedy | None:
    makers = {name: node for node in graph.nodes for name in node.outputs}
    for node in graph.nodes:
        if _is(node, "Concat", 1) and len(node.inputs) > 1:
            found = _selection(graph, makers, node)
            if found is not None:
                return found
    return None


def _selection(graph: GraphFile, makers: Makers, concat: Node) -> Greedy | None:
    """What a Concat of picks stands for; None where they are not picked step after step by one rule."""
    picks = [_behind(makers, name, "Unsqueeze") for name in concat.inputs]
    if not all(_is(pick, "ArgMax", 1) and not pick.ints.get("select_last_index") for pick in picks):
        return None
    steps = {_step(makers, before, after) for before, after in pairwise(picks)}
    lines, gone = steps.pop()
    table = makers.get(lines, _NOTHING)
    if steps or not _is(table, "Reshape") or not _is_gone(graph, makers, gone):
        return None
    scores, factors = picks[0].inputs[0], table.inputs[0]
    count = _count(graph, scores, factors)
    return Greedy(scores, factors, concat.outputs[0], count, len(picks)) if count else None


def _step(makers: Makers, before: Node, after: Node) -> tuple[str, str]:
    """The lines of factors and the value of a pick, where `after` picks from what `before` left; else ""."""
    scatter = makers.get(after.inputs[0], _NOTHING)
    if not _is(scatter, "ScatterElements", 1) or scatter.texts.get("reduction", "none") != "none":
        return "", ""
    product = makers.get(scatter.inputs[0], _NOTHING)
    if not _is(product, "Mul") or _behind(makers, scatter.inputs[1], "Unsqueeze") is not before:
        return "", ""
    scores, row = product.inputs
    line = _behind(makers, row, "Squeeze")
    if scores != before.inputs[0] or not _is(line, "Gather", 0):
        return "", ""
    place = makers.get(line.inputs[1], _NOTHING)
    if _is(place, "Add"):  # in a batch every picture has lines of its own
        place = makers.get(place.inputs[0], _NOTHING)
    return (line.inputs[0], scatter.inputs[2]) if place is before else ("", "")


def _is(node: Node, operator: str, axis: int | None = None) -> bool:
    return node.op == operator and node.ints.get("axis") == axis


def _behind(makers: Makers, name: str, operator: str) -> Node:
    """What makes a tensor, looking through one node that only changes its shape."""
    node = makers.get(name, _NOTHING)
    return makers.get(node.inputs[0], _NOTHING) if node.op == operator else node


def _is_gone(graph: GraphFile, makers: Makers, name: str) -> bool:
    """Whether a pick's score becomes -inf, here a constant that may be repeated for a batch."""
    node = makers.get(name, _NOTHING)
    weight = graph.weights.get(node.inputs[0] if node.op == "Expand" else name)
    return weight is not None and len(weight.raw) >= 4 and not weight.raw.replace(_GONE, b"")


def _count(graph: GraphFile, scores: str, factors: str) -> int:
    """The number of tokens; 0 where shapes or dtypes are not those of the kernel."""
    row, table = graph.tensors.get(scores), graph.tensors.get(factors)
    if row is None or table is None or (row.dtype, table.dtype) != ("float32", "float32"):
        return 0
    count = row.shape[-1]
    fits = len(row.shape) == 2 and table.shape[1:] == (count, count)
    return count if fits and isinstance(count, int) else 0


# -- writing -------------------------------------------------------------------------------------------------


def _with_node(data: bytes, graph: GraphFile, found: Greedy) -> bytes:
    """A GraphProto whose nodes give `picks` by the new one; nodes and constants without a reader go."""
    nodes = [Node(OPERATOR, DOMAIN, "", (found.scores, found.factors), (found.picks,))]
    nodes += [node for node in graph.nodes if found.picks not in node.outputs]
    wanted = _wanted(nodes, graph.outputs)
    numbered, content = iter(graph.nodes), b""
    for number, value in fields(data):
        if number == 1:
            node = next(numbered)
            if found.picks in node.outputs:
                content += _field(1, _node(found))
            elif wanted & set(node.outputs):
                content += _field(1, value)
        elif number != 5 or _name(value) in wanted:
            content += _field(number, value)
    return content


def _wanted(nodes: list[Node], outputs: tuple[str, ...]) -> set[str]:
    """The tensors that a graph's outputs come from."""
    makers = {name: node for node in nodes for name in node.outputs}
    wanted, open_ones = set(outputs), list(outputs)
    while open_ones:
        node = makers.get(open_ones.pop())
        more = set(node.inputs) - wanted if node else set()
        wanted |= more
        open_ones += more
    return wanted


def _node(found: Greedy) -> bytes:
    # A list of one: TensorRT's Python plugins cannot read a single number where numpy is 2.4 or newer.
    keep = _field(1, b"keep") + _field(8, found.keep) + _field(20, _INTS)
    # TensorRT's parser looks a plugin up under this attribute.
    space = _field(1, b"plugin_namespace") + _field(4, DOMAIN.encode()) + _field(20, _STRING)
    parts = [(1, found.scores), (1, found.factors), (2, found.picks), (3, f"{DOMAIN}_{OPERATOR}")]
    parts += [(4, OPERATOR), (7, DOMAIN)]
    texts = b"".join(_field(number, text.encode()) for number, text in parts)
    return texts + _field(5, keep) + _field(5, space)


def _name(tensor: int | bytes) -> str:
    """The name in a TensorProto."""
    assert isinstance(tensor, bytes)  # `read_graph` has read it
    names = (value for number, value in fields(tensor) if number == 8)
    return next((name.decode() for name in names if isinstance(name, bytes)), "")


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    content = b""
    while number > 127:
        content += bytes([number & 127 | 128])
        number >>= 7
    return content + bytes([number])
