"""Where ONNX Runtime put a graph's nodes: on a GPU, what it left to the CPU is told, not hidden.

A node without a GPU kernel runs on the CPU, in silence, with copies there and back. ONNX Runtime itself puts
what computes sizes and places there, on purpose: nodes that read and write whole numbers and booleans only
are not complained about.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from vtp.engines.errors import VtpError
from vtp.engines.graph.file import GraphFile, read_graph

_SHOWN = 5


def record_assignment(options: Any) -> None:
    """Let a session that is opened with these options remember where its nodes went (1.31 does)."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def refuse_cpu_nodes(path: Path, session: Any, provider: str) -> None:
    """VtpError with the list where nodes that compute with floats are not on `provider`.

    An ONNX Runtime that does not tell is believed.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return
    strays = cpu_nodes(read_graph(path), session, provider)
    if strays:
        counted = Counter(strays)
        said = [f"{operator} x {number}" for operator, number in counted.most_common(_SHOWN)]
        more = f" and {len(counted) - _SHOWN} more" if len(counted) > _SHOWN else ""
        raise VtpError(
            f"{len(strays)} nodes of {path.name} have no kernel in {provider} and would run on the CPU: "
            f"{', '.join(said)}{more}; go on with --allow-cpu-nodes, or use --engine ort-cpu"
        )


def cpu_nodes(graph: GraphFile, session: Any, provider: str) -> list[str]:
    """Operators, one for each node that computes with floats and is not on `provider`."""
    harmless = _of_whole_numbers(graph)
    return [
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.name not in harmless
    ]


def _of_whole_numbers(graph: GraphFile) -> set[str]:
    """Names of the nodes that read and write no float, where the file tells their dtypes."""
    kinds = {name: tensor.dtype for name, tensor in graph.tensors.items()}
    kinds |= {name: weight.dtype for name, weight in graph.weights.items()}
    found = set()
    for node in graph.nodes:
        read = node.outputs if node.op in ("Shape", "Size") else (*node.inputs, *node.outputs)
        dtypes = {kinds.get(name, "unknown") for name in read if name}
        if all(dtype.startswith(("int", "uint", "bool")) for dtype in dtypes):
            found.add(node.name)
    return found
