"""The greedy plugin in real pruner graphs: found, put in the place of the steps, and the same picks."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from vtp.engines import VtpError
from vtp.engines.plugins.rewrite import Greedy, find_greedy, with_greedy_node
from vtp.engines.tensorrt.library import INSTALL, library_log, load_library
from vtp.export import pruners

from ...stand_ins.greedy_host import needs_compiler, pick
from .compared import MARGIN, REFERENCES, Case, export, lattice

ENGINE = "tensorrt-rtx"
needs_rtx = [
    pytest.mark.trtrtx,
    pytest.mark.skipif(
        util.find_spec("tensorrt_rtx") is None, reason=f"tensorrt_rtx is not installed: {INSTALL[ENGINE]}"
    ),
]
METHODS = ["adaptprune", "focal"]  # those whose steps multiply scores by a line of factors
FULL = Case((24, 24), 57)


@pytest.fixture(scope="module", params=METHODS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A method's graph at its full size, 57 of 576 tokens, and its name."""
    path = tmp_path_factory.mktemp("plugin") / "pruner.onnx"
    export(pruners.find_method(request.param)(FULL.grid, FULL.keep).eval(), FULL, path)
    return request.param, path


def cues(seed: int, batch: int = 2) -> dict[str, np.ndarray]:
    """Scores, features and keys: coarse ones with many ties, near-duplicates, or arbitrary ones."""
    rng = np.random.default_rng(seed)
    if seed % 3 == 0:
        return lattice(FULL, batch, seed)
    rows = rng.standard_normal((batch, 576, 16), np.float32)
    if seed % 3 == 1:  # neighbours look the same but for the last bits
        rows[:, 1::2] = rows[:, ::2] * np.float32(1 + 2**-22)
    scores = rng.random((batch, 576), np.float32)
    return {"attention_scores": scores, "keys": rows, "image_features": rows}


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})


def halves(content: bytes, found: Greedy) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A graph with the plugin's node, cut in two: what feeds the node, and what follows from its picks."""
    model = onnx.load_from_string(content)
    node = next(node for node in model.graph.node if node.op_type == "greedy")
    assert (node.domain, list(node.input)) == ("vtp", [found.scores, found.factors])
    assert {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute} == {
        "keep": [found.keep],
        "plugin_namespace": b"vtp",
    }
    parts = []
    for wanted, given in (([found.scores, found.factors], []), (["keep_indices"], [found.picks])):
        part = onnx.ModelProto()
        part.CopyFrom(model)
        del part.graph.output[:], part.graph.node[:], part.opset_import[1:]
        part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        part.graph.node.extend(node for node in needed(model, wanted, given))
        if given:
            del part.graph.input[:]
            kind = onnx.TensorProto.INT64
            part.graph.input.append(onnx.helper.make_tensor_value_info(given[0], kind, ["batch", found.keep]))
        parts.append(part)
    return parts[0], parts[1]


def needed(model: onnx.ModelProto, wanted: list[str], given: list[str]) -> Iterator[onnx.NodeProto]:
    """The nodes, in their order, that `wanted` come from when `given` are known."""
    known, names = set(given), set(wanted)
    for node in reversed(model.graph.node):
        if set(node.output) & names - known:
            names |= set(node.input)
    return (
        node for node in model.graph.node if set(node.output) & names - known and node.op_type != "greedy"
    )


@needs_compiler
def test_the_graph_with_the_plugin_keeps_the_same_tokens(exported: tuple[str, Path]) -> None:
    """The kernel fed by the graph's own first half, its picks into the second: as the unrolled graph."""
    method, path = exported
    content, found = with_greedy_node(path)
    assert (found.count, found.keep) == (576, 57)
    first, last = halves(content, found)
    checked = 0
    for seed in range(9):
        feeds = cues(seed)
        scores, factors = run(first, feeds)
        picks = pick(scores, factors, found.keep, shuffle=seed)
        kept = run(last, {found.picks: picks})[0]
        np.testing.assert_array_equal(kept, run(onnx.load(path), feeds)[0])
        given = {name: feeds[name][0] for name in pruners.find_method(method).needs}
        wanted, margin = REFERENCES[method](FULL.grid, FULL.keep, **given)
        if seed % 3 == 0 or margin > MARGIN[method]:
            np.testing.assert_array_equal(kept[0], wanted)
            checked += 1
    assert checked >= 3


def test_nothing_else_in_the_file_changes(exported: tuple[str, Path]) -> None:
    _, path = exported
    before, after = onnx.load(path), onnx.load_from_string(with_greedy_node(path)[0])
    onnx.checker.check_model(after)
    assert len(before.graph.node) - len(after.graph.node) > 57 * 4
    old = {node.SerializeToString() for node in before.graph.node}
    assert [node.op_type for node in after.graph.node if node.SerializeToString() not in old] == ["greedy"]
    assert after.graph.input == before.graph.input and after.graph.output == before.graph.output
    constants = {item.name: item for item in before.graph.initializer}
    assert all(constants[item.name] == item for item in after.graph.initializer)
    assert {item.domain: item.version for item in after.opset_import}["vtp"] == 1


def change(path: Path, operator: str, **attributes: object) -> None:
    """Rewrite a graph: its third node of this operator gets other attributes."""
    model = onnx.load(path)
    node = [node for node in model.graph.node if node.op_type == operator][2]
    for name, value in attributes.items():
        kept = [item for item in node.attribute if item.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
    onnx.save(model, path)


def keep_the_picked(path: Path) -> None:
    """Rewrite a graph: a pick's score becomes 0 instead of -inf."""
    model = onnx.load(path)
    for item in model.graph.initializer:
        array = numpy_helper.to_array(item)
        if array.dtype == np.float32 and np.isneginf(array).all():
            item.CopyFrom(numpy_helper.from_array(np.zeros_like(array), item.name))
    onnx.save(model, path)


@pytest.mark.parametrize("method", METHODS)
def test_another_rule_is_not_taken_for_this_one(tmp_path: Path, method: str) -> None:
    case = Case((4, 4), 5)
    path = tmp_path / "pruner.onnx"

    def fresh() -> Path:
        export(pruners.find_method(method)(case.grid, case.keep).eval(), case, path)
        return path

    found = find_greedy(fresh())
    assert found is not None and (found.count, found.keep) == (16, 5)
    original = path.read_bytes()
    for operator, attributes in (
        ("ArgMax", {"select_last_index": 1}),
        ("ArgMax", {"axis": 0}),
        ("ScatterElements", {"reduction": "mul"}),
        ("ScatterElements", {"axis": 0}),
        ("Gather", {"axis": 1}),
    ):
        path.write_bytes(original)
        change(path, operator, **attributes)
        assert find_greedy(path) is None, (operator, attributes)
    path.write_bytes(original)
    keep_the_picked(path)
    assert find_greedy(path) is None
    with pytest.raises(VtpError, match=r"pruner\.onnx has no greedy selection that the plugin"):
        with_greedy_node(path)


@pytest.mark.parametrize("method", ["fastv", "divprune", "scope"])
def test_other_methods_have_none(tmp_path: Path, method: str) -> None:
    case = Case((4, 4), 5)
    export(pruners.find_method(method)(case.grid, case.keep).eval(), case, tmp_path / "pruner.onnx")
    assert find_greedy(tmp_path / "pruner.onnx") is None


class TestWithTensorRtRtx:
    """What the one NVIDIA library at hand says: it has no plugins with a kernel compiled ahead of time."""

    pytestmark = needs_rtx

    def test_all_but_the_plugins_node_is_taken(self, exported: tuple[str, Path]) -> None:
        trt, log = load_library(ENGINE), library_log(ENGINE)
        builder = trt.Builder(log)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        assert not parser.supports_model_v2(with_greedy_node(exported[1])[0], str(exported[1]))
        refused = {parser.get_error(place).node_operator() for place in range(parser.num_errors)}
        assert refused == {"greedy"}

    def test_it_has_no_module_for_such_plugins(self) -> None:
        """Once this fails, the plugin can be tried with TensorRT-RTX."""
        assert util.find_spec("tensorrt_rtx.plugin")  # there is a folder, but:
        with pytest.raises(ImportError, match=r"tensorrt_rtx_bindings\.plugin"):
            __import__("tensorrt_rtx.plugin")
        assert not hasattr(load_library(ENGINE), "IPluginV3QuickAOTBuild")
