"""The same graph files of a stranger, opened by OpenVINO."""

from __future__ import annotations

from . import graphs


class Area(graphs.Area):
    """As `graphs`; float64 goes to ONNX Runtime, as it always does."""

    engine = "openvino-cpu"
