"""What ONNX Runtime 1.23, the oldest for target ort, cannot open on the CPU, read from a graph's file.

The operators are those without a kernel in 1.23.2, found with a graph of each case that the onnx package has
for a single standard operator (onnx.backend.test.case.node; 190 operators), written as opset 23.
"""

from __future__ import annotations

from pathlib import Path

import onnx

OPSET, IR_VERSION = 23, 11
ABSENT = {
    "Bernoulli",
    "DeformConv",
    "ImageDecoder",
    "LpNormalization",
    "QuantizeLinear",
    "RandomUniformLike",
    "RoiAlign",
}
# ONNX Runtime's own that vtp writes; LinearAttention came with 1.25.1.
MICROSOFT = {
    "DequantizeLinear",
    "GroupQueryAttention",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "QuantizeLinear",
}


def too_new(path: Path) -> list[str]:
    """Why 1.23 does not open a graph; nothing if it should."""
    model = onnx.load(path, load_external_data=False)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    found = [f"opset {opsets['']}"] if opsets.get("", 0) > OPSET else []
    found += [f"IR {model.ir_version}"] if model.ir_version > IR_VERSION else []
    for domain, operator in sorted({(node.domain, node.op_type) for node in model.graph.node}):
        known = operator not in ABSENT or opsets[""] < OPSET
        if not (known if domain == "" else domain == "com.microsoft" and operator in MICROSOFT):
            found.append(f"{domain}::{operator}")
    return found
