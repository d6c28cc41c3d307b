"""Graphs of strangers: what reads outside its files, or runs what vtp never writes, is refused unopened.

Hostile graphs are made with the onnx package, so that every library reads in them what the test means.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper
from onnx import numpy_helper as numbers

from vtp.engines import VtpError
from vtp.engines.graph.check import check_graph
from vtp.engines.graph.file import read_graph

FILES = {"w.data": 64}


def model(*nodes: NodeProto, weights: tuple[TensorProto, ...] = ()) -> ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    relu = helper.make_node("Relu", ["x"], ["y"])
    graph = helper.make_graph([*nodes, relu], "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def outside(location: str = "w.data", **said: int | str) -> TensorProto:
    """A weight [4] float32 in external data."""
    tensor = TensorProto(name="w", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **said}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def check(tmp_path: Path, made: ModelProto | bytes, name: str = "g.onnx") -> None:
    (tmp_path / name).write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    check_graph(tmp_path / name, FILES)


def refuse(tmp_path: Path, made: ModelProto | bytes, match: str, name: str = "g.onnx") -> None:
    with pytest.raises(VtpError, match=match) as caught:
        check(tmp_path, made, name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path))


# -- places ------------------------------------------------------------------------------------------------


def as_weight(tensor: TensorProto) -> ModelProto:
    return model(weights=(tensor,))


def as_constant(tensor: TensorProto) -> ModelProto:
    return model(helper.make_node("Constant", [], ["c"], value=tensor))


def as_other_attribute(tensor: TensorProto) -> ModelProto:
    node = helper.make_node("Relu", ["x"], ["z"])
    node.attribute.append(AttributeProto(name="any", type=AttributeProto.TENSORS, tensors=[tensor]))
    return model(node)


def as_attribute_of_another_type(tensor: TensorProto) -> ModelProto:
    """A number by its type, and the tensor is there all the same."""
    node = helper.make_node("Relu", ["x"], ["z"])
    node.attribute.append(AttributeProto(name="any", type=AttributeProto.INT, t=tensor))
    return model(node)


def as_merged_attribute(tensor: TensorProto) -> bytes:
    """The tensor of an attribute said twice, which parsers merge."""
    harmless = numbers.from_array(np.zeros(4, np.float32), "w")
    first, second = as_constant(harmless).graph.node[0], as_constant(tensor).graph.node[0]
    attribute = first.attribute[0].SerializeToString() + second.attribute[0].SerializeToString()
    node = NodeProto(op_type="Constant", output=["c"]).SerializeToString() + field(5, attribute)
    merged = model().SerializeToString() + field(7, field(1, node))
    assert onnx.load_model_from_string(merged).graph.node[-1].attribute[0].t.external_data
    return merged


def field(number: int, content: bytes) -> bytes:
    """A field with a length, as protocol buffers have it."""
    length, size = b"", len(content)
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


HIDDEN: list[Callable[[TensorProto], Any]] = [
    as_weight,
    as_constant,
    as_other_attribute,
    as_attribute_of_another_type,
]


@pytest.mark.parametrize("hide", HIDDEN)
@pytest.mark.parametrize(
    "location",
    [
        "../w.data",
        "/etc/passwd",
        "./w.data",
        "sub/w.data",
        "sub\\w.data",
        "C:w.data",
        "",
        "w.data\0",
        "other.data",
        "*/_ORT_MEM_ADDR_/*",
        "x" * 5000,
    ],
)
def test_weights_are_read_from_the_bundle_s_files_only(tmp_path: Path, hide: Any, location: str) -> None:
    check(tmp_path, hide(outside(offset=48, length=16)))
    refuse(
        tmp_path, hide(outside(location)), "reads weights from '.*', which is not one of the bundle's files"
    )


def test_a_weight_that_parsers_merge_together(tmp_path: Path) -> None:
    refuse(tmp_path, as_merged_attribute(outside("../secret")), "two graphs|not one of the bundle's files")


def test_a_place_that_is_not_used_counts(tmp_path: Path) -> None:
    """Data location DEFAULT: another library may look at the place all the same."""
    tensor = outside("../secret")
    tensor.data_location = TensorProto.DEFAULT
    tensor.raw_data = bytes(16)
    refuse(tmp_path, as_weight(tensor), "not one of the bundle's files")


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"offset": 49}, "beyond the end of w.data, which has 64 bytes"),
        ({"offset": 2**62}, "beyond the end"),
        ({"offset": 10**30}, "has a weight at '1000"),
        ({"offset": -16}, "has a weight at '-16'"),
        ({"offset": " 0"}, "has a weight at"),
        ({"length": 12}, "has a weight of 12 bytes that needs 16"),
        ({"length": 2**62}, "that needs 16"),
        ({"basepath": "/etc"}, "says 'basepath' of a weight"),
    ],
)
def test_places_beyond_a_file(tmp_path: Path, said: dict[str, Any], match: str) -> None:
    refuse(tmp_path, as_weight(outside(**said)), match)


def test_a_place_that_is_said_twice(tmp_path: Path) -> None:
    tensor = outside()
    tensor.external_data.add(key="location", value="w.data")
    refuse(tmp_path, as_weight(tensor), "says 'location' of a weight")


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.UNDEFINED, 99])
def test_types_that_lie_nowhere_outside(tmp_path: Path, kind: int) -> None:
    content = outside().SerializeToString().replace(b"\x10\x01", bytes([0x10, kind]), 1)
    refuse(tmp_path, _with_weight(content), "unknown type")


def _with_weight(content: bytes) -> bytes:
    graph = model().graph.SerializeToString() + field(5, content)
    return field(7, graph)


@pytest.mark.parametrize("shape", [[2**40], [2**62, 2**62], [-1], [3] * 1000])
@pytest.mark.parametrize("place", [False, True])
def test_weights_larger_than_their_values(tmp_path: Path, shape: list[int], place: bool) -> None:
    tensor = outside() if place else TensorProto(name="w", data_type=TensorProto.FLOAT, raw_data=bytes(16))
    del tensor.dims[:]
    tensor.dims.extend(shape)
    refuse(tmp_path, as_weight(tensor), "beyond the end|without its values|negative axis|1000 axes")


# -- operators ---------------------------------------------------------------------------------------------


def test_control_flow_is_refused(tmp_path: Path) -> None:
    """A loop of 2^62 rounds never ends, and cannot be stopped from outside."""
    rounds = numbers.from_array(np.array(2**62), "rounds")
    go = numbers.from_array(np.array(True), "go")
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [4]),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]),
        ],
    )
    loop = helper.make_node("Loop", ["rounds", "go", "x"], ["z"], body=body)
    onnx.checker.check_model(model(loop, weights=(rounds, go)))
    refuse(tmp_path, model(loop, weights=(rounds, go)), r"has control flow \(Loop\)|graph within a node")


@pytest.mark.parametrize("operator", ["If", "Loop", "Scan", "SequenceMap"])
def test_graphs_in_attributes_are_refused_under_any_name(tmp_path: Path, operator: str) -> None:
    refuse(tmp_path, model(helper.make_node(operator, ["x"], ["z"])), "has control flow")
    for said in ({"g": GraphProto()}, {"graphs": [GraphProto()]}):
        node = helper.make_node("Relu", ["x"], ["z"])
        node.attribute.append(AttributeProto(name="body", **said))
        refuse(tmp_path, model(node), "a graph within a node")


@pytest.mark.parametrize(
    ("domain", "operator"),
    [
        ("com.microsoft", "EPContext"),
        ("com.microsoft", "BeamSearch"),
        ("com.microsoft.nchwc", "Conv"),
        ("ai.onnx.ml", "TreeEnsemble"),
        ("ai.onnx.contrib", "StringJoin"),
        ("pkg.torch", "x"),
        ("vtp", "greedy"),
        ("trt.plugins", "y"),
    ],
)
def test_foreign_operators_are_refused(tmp_path: Path, domain: str, operator: str) -> None:
    refuse(tmp_path, model(helper.make_node(operator, ["x"], ["z"], domain=domain)), f"{domain}::{operator}")


def test_what_vtp_writes_is_taken(tmp_path: Path) -> None:
    nodes = [helper.make_node(name, ["x"], [name], domain="com.microsoft") for name in ("MatMulNBits",)]
    check(tmp_path, model(*nodes, helper.make_node("Tile", ["x", "x"], ["z"], domain="ai.onnx")))


@pytest.mark.parametrize("operator", ["RandomNormal", "RandomUniformLike", "Bernoulli", "Multinomial"])
def test_random_numbers_are_refused(tmp_path: Path, operator: str) -> None:
    refuse(tmp_path, model(helper.make_node(operator, ["x"], ["z"])), "has random numbers")


def test_an_operator_said_twice_is_both(tmp_path: Path) -> None:
    """Parsers take the last; this reader of graphs does, too."""
    node = helper.make_node("Relu", ["x"], ["z"]).SerializeToString()
    node += NodeProto(op_type="Loop", domain="evil").SerializeToString()
    content = field(7, model().graph.SerializeToString() + field(1, node))
    assert onnx.load_model_from_string(content).graph.node[-1].op_type == "Loop"
    refuse(tmp_path, content, "has control flow|evil::")
    (tmp_path / "g.onnx").write_bytes(content)
    assert (
        read_graph(tmp_path / "g.onnx").nodes[-1].op,
        read_graph(tmp_path / "g.onnx").nodes[-1].domain,
    ) == (
        "Loop",
        "evil",
    )


def test_functions_training_and_sparse_weights_are_refused(tmp_path: Path) -> None:
    function = model()
    function.functions.add(name="f", domain="")
    refuse(tmp_path, function, "holds functions")
    training = model()
    training.training_info.add()
    refuse(tmp_path, training, "holds training graphs")
    sparse = model()
    sparse.graph.sparse_initializer.add(values=outside("../secret"))
    refuse(tmp_path, sparse, "has sparse weights")
    node = helper.make_node("Constant", [], ["c"])
    node.attribute.append(AttributeProto(name="sparse_value", sparse_tensor=SparseTensorProto()))
    refuse(tmp_path, model(node), "has a sparse tensor")


# -- files that are no graphs --------------------------------------------------------------------------------


def test_two_graphs_in_one_file(tmp_path: Path) -> None:
    hidden = field(7, as_weight(outside("../secret")).graph.SerializeToString())
    for content in (hidden + model().SerializeToString(), model().SerializeToString() + hidden):
        refuse(tmp_path, content, "two graphs|not one of the bundle's files")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(64),
        b"\x3a\xff\xff\xff\xff\x7f",  # a graph of 34 GB
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x38\x80\x80\x80\x80\x80\x80\x80\x80\x40",  # a number where the graph belongs
        field(7, b"\x08\x80\x80\x80\x80\x80\x80\x40"),  # likewise a node
        field(7, b"\x58\x80\x80\x80\x80\x80\x80\x40"),  # likewise an input
        field(7, field(1, b"\x28\x80\x80\x80\x80\x80\x80\x40")),  # likewise an attribute
        b"\xba\x80\x80\x80\x10" + b"\x00",  # field 7 for who counts in 32 bits
        field(7, field(1, b"\x2a\x03a")),
        field(7, field(1, field(4, b"\xff\xfe"))),
        b"\x3b" * 100_000,  # groups within groups
        field(7, b"") + b"\x0d\x01",
    ],
)
def test_what_is_no_graph_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(content)
    for read in (read_graph, lambda path: check_graph(path, FILES)):
        try:
            read(path)
        except VtpError as error:
            assert "is not an ONNX graph" in str(error) and "\n" not in str(error)
        else:
            assert read is not read_graph  # inputs are its job


def test_a_graph_of_names_without_end(tmp_path: Path) -> None:
    long = helper.make_tensor_value_info("v" * (1 << 20), TensorProto.FLOAT, [1]).SerializeToString()
    refuse(tmp_path, field(7, field(13, long) * 20), "more than 16 MB of nodes and names")
    refuse(tmp_path, field(7, field(5, field(6, b"") * 2_000_000)), "more than 16 MB|without its values")


def test_other_formats_and_pipes(tmp_path: Path) -> None:
    refuse(tmp_path, model(), "is not named .onnx", "g.ort")
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(VtpError, match="a named pipe"):
        check_graph(tmp_path / "pipe.onnx", FILES)


@pytest.mark.parametrize("name", ["adaptprune", "jetpack6", "float16"])
def test_what_the_exporter_writes_is_taken(exported: Callable[[str], Any], name: str) -> None:
    folder = exported(name).folder
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    for path in folder.glob("*.onnx"):
        check_graph(path, sizes)
