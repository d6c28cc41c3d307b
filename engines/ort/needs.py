"""What a graph wants that an older ONNX Runtime does not have, to say so where one cannot load it.

Found by opening such graphs on the CPU with every version from 1.23.0 on. Graphs that vtp writes for this
engine open from 1.23 on, but for linear attention; quantised ones of earlier vtp have QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Iterator

from vtp.engines.graph.file import GraphFile
from vtp.engines.graph.masks import SINCE, masks_attention
from vtp.engines.versions import version_numbers

_MICROSOFT = "com.microsoft"
# (domain, operator, the opset from which on it holds) -> the first version that runs it, and another way out
_SINCE = {
    (_MICROSOFT, "LinearAttention", 1): ("1.25.1", ""),
    ("", "QuantizeLinear", 23): ("1.24", ", or vtp-calib quantize from the float bundle again"),
}


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
