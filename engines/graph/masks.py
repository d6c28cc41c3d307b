"""Which graphs attend through a mask in ONNX Runtime's GroupQueryAttention: older versions do not know it."""

from __future__ import annotations

from vtp.engines.graph.file import GraphFile

OPERATOR = "GroupQueryAttention"
SINCE = (1, 30)  # the first onnxruntime whose operator has the attribute `causal`; 1.29.0 has not


def masks_attention(graph: GraphFile) -> bool:
    """Whether what tokens see is told by masks: then they may see what comes after them."""
    return any(node.op == OPERATOR and not node.ints.get("causal", 1) for node in graph.nodes)
