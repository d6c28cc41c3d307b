"""What an older ONNX Runtime does not have is told with the version that does, and as little as that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vtp.engines import VtpError, open_graph
from vtp.engines.graph.file import GraphFile, read_graph
from vtp.engines.ort.needs import unguarded_products, unmet_need


def graph(folder: Path, operator: str, domain: str, opset: int, **attributes: int) -> GraphFile:
    node = helper.make_node(operator, ["x", "s", "z"], ["y"], domain=domain, **attributes)
    x, s, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in "xsz")
    y = helper.make_tensor_value_info("y", TensorProto.UINT8, [])
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(helper.make_graph([node], "g", [x, s, z], [y]), opset_imports=domains)
    onnx.save(made, folder / "g.onnx")
    return read_graph(folder / "g.onnx")


def test_linear_attention_names_its_version(tmp_path: Path) -> None:
    found = graph(tmp_path, "LinearAttention", "com.microsoft", 23)
    assert unmet_need(found, "1.25.0") == (
        "it has LinearAttention, which came with 1.25.1; pip install 'onnxruntime>=1.25.1' (or "
        "onnxruntime-gpu; Python 3.11 or newer)"
    )
    assert unmet_need(found, "1.25.1") == unmet_need(found, "1.31.1") == ""


def test_int8_of_an_earlier_vtp_names_its_version_and_the_other_way(tmp_path: Path) -> None:
    found = unmet_need(graph(tmp_path, "QuantizeLinear", "", 23), "1.23.2")
    assert found.startswith("it has QuantizeLinear of opset 23, which came with 1.24; pip install ")
    assert found.endswith(", or vtp-calib quantize from the float bundle again")


def test_attention_that_takes_masks_names_its_version_and_the_other_way(tmp_path: Path) -> None:
    found = graph(tmp_path, "GroupQueryAttention", "com.microsoft", 23, causal=0)
    told = unmet_need(found, "1.29.0")
    assert told.startswith("it has attention that takes masks, which came with 1.30; pip install ")
    assert told.endswith(", or export the bundle again without --oldest-onnxruntime")
    assert unmet_need(found, "1.30.0") == ""


@pytest.mark.parametrize(
    ("operator", "domain", "opset", "version"),
    [
        ("QuantizeLinear", "", 23, "1.24.1"),
        ("QuantizeLinear", "", 20, "1.17.0"),  # of target jetpack6
        ("QuantizeLinear", "com.microsoft", 23, "1.23.2"),  # what vtp-calib quantize writes for ort
        ("DequantizeLinear", "", 23, "1.23.2"),
        ("GroupQueryAttention", "com.microsoft", 23, "1.23.2"),  # which is causal unless told otherwise
    ],
)
def test_what_runs_is_not_complained_about(
    tmp_path: Path, operator: str, domain: str, opset: int, version: str
) -> None:
    assert unmet_need(graph(tmp_path, operator, domain, opset), version) == ""


@pytest.mark.parametrize(
    ("operator", "domain", "inputs"),
    [
        ("MatMulInteger", "", ["a", "w"]),
        ("MatMulInteger", "", ["a", "w", "za", "zw"]),
        ("MatMulInteger", "", ["a", "w", "za"]),
        ("MatMulIntegerToFloat", "com.microsoft", ["a", "w", "one", "s", "za", ""]),
        ("MatMulIntegerToFloat", "com.microsoft", ["a", "w", "one", "s", "za", "zw"]),
    ],
)
def test_products_that_would_end_the_process_are_refused(
    tmp_path: Path, operator: str, domain: str, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen of 1.23.2, 1.24.1, 1.28.0 and 1.29.0 on an x86 processor without VNNI: all but those with "zw"."""
    node = helper.make_node(operator, inputs, ["y"], domain=domain)
    kind = TensorProto.FLOAT if domain else TensorProto.INT32
    x = helper.make_tensor_value_info("a", TensorProto.UINT8, [1, 4])
    y = helper.make_tensor_value_info("y", kind, [1, 2])
    parts = [
        numpy_helper.from_array(np.ones((4, 2), np.int8), "w"),
        numpy_helper.from_array(np.array(128, np.uint8), "za"),
        numpy_helper.from_array(np.array(0, np.int8), "zw"),
        numpy_helper.from_array(np.array(1, np.float32), "one"),
        numpy_helper.from_array(np.ones(2, np.float32), "s"),
    ]
    made = helper.make_graph([node], "g", [x], [y], [one for one in parts if one.name in inputs])
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    file = tmp_path / "g.onnx"
    onnx.save(helper.make_model(made, opset_imports=domains, ir_version=10), file)
    said = unguarded_products(file, "1.29.1")
    assert unguarded_products(file, "1.30.0") == ""
    open_graph(file, "ort-cpu", 1).close()
    if "zw" in inputs:
        assert said == ""
        return
    assert said.startswith(f"its {operator} has no zero point for the weights, which before 1.30 can end")
    monkeypatch.setattr("onnxruntime.__version__", "1.29.1")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(VtpError, match=r"cannot load g.onnx: its .*pip install 'onnxruntime>=1.30'"):
        open_graph(file, "ort-cpu", 1)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    open_graph(file, "ort-cpu", 1).close()
