"""What a graph wants that an older ONNX Runtime does not have, to say so where one cannot load it.

Found by opening such graphs on the CPU with every version from 1.23.0 on. Graphs that vtp writes for this
engine open from 1.23 on, but for linear attention; quantised ones of earlier vtp have QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vtp.engines.graph.file import GraphFile, read_graph
from vtp.engines.graph.masks import SINCE, masks_attention
from vtp.engines.versions import version_numbers

_MICROSOFT = "com.microsoft"
# (domain, operator, the opset from which on it holds) -> the first version that runs it, and another way out
_SINCE = {
    (_MICROSOFT, "LinearAttention", 1): ("1.25.1", ""),
    ("", "QuantizeLinear", 23): ("1.24", ", or vtp-calib quantize from the float bundle again"),
}

# The input that is the zero point of the weights, by the operator.
_WEIGHT_ZERO_POINT = {("", "MatMulInteger"): 3, (_MICROSOFT, "MatMulIntegerToFloat"): 5}
_CHECKED_SINCE = "1.30"


def unmet_need(graph: GraphFile, version: str) -> str:
    """Why ONNX Runtime of `version` cannot run a graph, and what to do; empty if no reason is known."""
    for what, first, otherwise in _needs(graph):
        if version_numbers(version) < version_numbers(first):
            return (
                f"it has {what}, which came with {first}; pip install 'onnxruntime>={first}' (or "
                f"onnxruntime-gpu; Python 3.11 or newer){otherwise}"
            )
    return ""


def _needs(graph: GraphFile) -> Iterator[tuple[str, str, str]]:
    """What a graph has that is not as old as vtp's support, the first version with it, another way out."""
    found = {(node.domain, node.op) for node in graph.nodes}
    for (domain, operator, opset), (first, otherwise) in _SINCE.items():
        if (domain, operator) in found and graph.opsets.get(domain, 0) >= opset:
            yield operator if domain else f"{operator} of opset {graph.opsets[domain]}", first, otherwise
    if masks_attention(graph):
        way = ", or export the bundle again without --oldest-onnxruntime"
        yield "attention that takes masks", ".".join(map(str, SINCE)), way


def unguarded_products(path: Path, version: str) -> str:
    """Why ONNX Runtime of `version` may end the whole process as it opens a graph; empty if it does not.

    The file is read for the versions that may. Raises VtpError when it is no graph then.

    Before 1.30, its pass that makes int8 weights uint8 (`session.x64quantprecision`, on x86 without VNNI)
    reads the zero point of the weights without a look whether the node has one.
    """
    if version_numbers(version) >= version_numbers(_CHECKED_SINCE):
        return ""
    for node in read_graph(path).nodes:
        place = _WEIGHT_ZERO_POINT.get((node.domain, node.op))
        if place is not None and not "".join(node.inputs[place : place + 1]):
            return (
                f"its {node.op} has no zero point for the weights, which before {_CHECKED_SINCE} can end the "
                f"process; pip install 'onnxruntime>={_CHECKED_SINCE}', or vtp-calib quantize again"
            )
    return ""
