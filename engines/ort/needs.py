"""What a graph wants that an older ONNX Runtime does not have, to say so where one cannot load it.

Found by opening such graphs on the CPU with every version from 1.23.0 on. Graphs that vtp writes for this
engine open from 1.23 on, but for linear attention; quantised ones of earlier vtp have QuantizeLinear.
"""

from __future__ import annotations

from vtp.engines.graph.file import GraphFile
from vtp.engines.versions import version_numbers

_MICROSOFT = "com.microsoft"
# (domain, operator, the opset from which on it holds) -> the first version that runs it, and another way out
_SINCE = {
    (_MICROSOFT, "LinearAttention", 1): ("1.25.1", ""),
    ("", "QuantizeLinear", 23): ("1.24", ", or vtp-calib quantize from the float bundle again"),
}


def unmet_need(graph: GraphFile, version: str) -> str:
    """Why ONNX Runtime of `version` cannot run a graph, and what to do; empty if no reason is known."""
    found = {(node.domain, node.op) for node in graph.nodes}
    for (domain, operator, opset), (first, otherwise) in _SINCE.items():
        old = version_numbers(version) < version_numbers(first)
        if old and (domain, operator) in found and graph.opsets.get(domain, 0) >= opset:
            kind = operator if domain else f"{operator} of opset {graph.opsets[domain]}"
            return (
                f"it has {kind}, which came with {first}; pip install 'onnxruntime>={first}' (or "
                f"onnxruntime-gpu; Python 3.11 or newer){otherwise}"
            )
    return ""
