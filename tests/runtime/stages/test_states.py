"""States beside a KV cache: bound in place, row by row, moved, and never cut back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from vtp.engines import VtpError, open_graph
from vtp.engines.base import Engine
from vtp.engines.graph.memory import graph_memory
from vtp.runtime.bundle.caches import KvInfo, StateTensors, present_of
from vtp.runtime.bundle.manifest import GraphInfo, TensorInfo, parse_manifest
from vtp.runtime.bundle.memory import cache_bytes
from vtp.runtime.stages.kv_cache import KvCache

KV = KvInfo([], heads=1, head_dim=8, capacity=6, dtype="float32", lengths="seqlens_k")
STATE = StateTensors("conv", [2, 5], [4, 3], "float32")


@pytest.fixture
def cache(tmp_path: Path, cpu_engine: str) -> KvCache:
    """Of a graph whose states become twice what they were plus the row's number of tokens."""
    names = {f"past_conv.{layer}": f"present_conv.{layer}" for layer in STATE.layers}
    lengths = [("seqlens_k", ["batch"]), ("total_sequence_length", [])]
    shape = ["batch", 4, 3]
    nodes = [
        helper.make_node("Cast", ["seqlens_k"], ["count"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["count", "axes"], ["column"]),
        helper.make_node("Identity", ["total_sequence_length"], ["total"]),
    ]
    for past, present in names.items():
        nodes.append(helper.make_node("Add", [past, past], [f"twice/{past}"]))
        nodes.append(helper.make_node("Add", [f"twice/{past}", "column"], [present]))
    graph = helper.make_graph(
        nodes,
        "states",
        [helper.make_tensor_value_info(name, TensorProto.INT32, axes) for name, axes in lengths]
        + [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names.values()]
        + [helper.make_tensor_value_info("total", TensorProto.INT32, [])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])],
    )
    path = tmp_path / "states.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    assert graph_memory(path, {"batch": 2}).activations == 16  # lengths: states lie in the cache
    engine: Engine = open_graph(path, cpu_engine)
    return KvCache(engine, KV, 3, [STATE])


def held(cache: KvCache) -> list[list[float]]:
    """The first number of every layer's state, row by row; all of a row are alike."""
    states = [value.numpy() for value in cache.states.feeds.values()]
    assert all((state == state[:, :1, :1]).all() for state in states)
    return np.stack([state[:, 0, 0] for state in states], axis=1).tolist()


def test_a_run_replaces_the_states_of_its_rows(cache: KvCache) -> None:
    """Row by row, together, and in a row that another one is copied to."""
    assert cache.states and cache.bytes == 3 * 2 * 12 * 4
    middle = cache.rows(1, 1)
    middle.advance(4), middle.run(middle._engine, {})
    assert held(cache) == [[0, 0], [3, 3], [0, 0]] and cache.lengths.tolist() == [0, 4, 0]
    assert cache.copy_row(1, 2) == 2 * 12 * 4
    assert held(cache) == [[0, 0], [3, 3], [3, 3]] and cache.lengths.tolist() == [0, 4, 4]
    cache.advance(1), cache.run(cache._engine, {})
    assert held(cache) == [[0, 0], [10, 10], [10, 10]]
    bound = cache.rows(0, 2)
    binding = bound._engine.bind(bound.feeds, {**bound.into, "total": bound._engine.zeros((), "int32")})
    bound.advance(1), binding.run()
    assert held(cache) == [[1, 1], [25, 25], [10, 10]]


def test_a_state_is_not_cut_back(cache: KvCache) -> None:
    cache.advance(np.array([5, 2, 5], np.int32))
    for cut in (lambda: cache.keep_first(3), lambda: cache.copy_row(0, 1, 3)):
        with pytest.raises(
            VtpError, match="a state of 5 tokens cannot be cut back to 3; read the prompt anew"
        ):
            cut()
    cache.reset()
    assert cache.length == 0


def test_names_and_bytes() -> None:
    assert present_of("past_key_values.3.key") == "present.3.key"
    assert present_of("past_conv.3") == "present_conv.3" and present_of("position_ids") is None
    graph = GraphInfo({}, {}, {}, KV, [STATE])
    assert cache_bytes(graph) == 2 * 12 * 4
    assert graph.carried == {"past_conv.2": "present_conv.2", "past_conv.5": "present_conv.5"}


def test_the_manifest_holds_states_against_the_graph(exported: Callable[[str], Any]) -> None:
    """A bundle without states does not name them; one with states is read back the same."""
    text = (exported("adaptprune").folder / "manifest.json").read_text(encoding="utf-8")
    data = json.loads(text)
    assert all("states" not in graph for graph in data["graphs"].values())
    graph = data["graphs"]["decoder.onnx"]
    tensor = {"dtype": "float32", "shape": ["batch", 4, 3]}
    graph["inputs"]["past_conv.7"], graph["outputs"]["present_conv.7"] = tensor, tensor
    state = {"name": "conv", "layers": [7], "shape": [4, 3], "dtype": "float32"}
    graph["states"] = [state]
    manifest = parse_manifest(json.dumps(data))
    assert manifest.graphs["decoder.onnx"].states == [StateTensors(**state)]
    assert manifest.graphs["decoder.onnx"].inputs["past_conv.7"] == TensorInfo(**tensor)
    assert parse_manifest(manifest.to_json()) == manifest
    for change, problem in (
        ({"layers": [8]}, "does not fit its inputs at layer 8"),
        ({"shape": [4]}, "does not fit its inputs at layer 7"),
        ({"shape": [5, 3]}, "does not fit its inputs at layer 7"),
        ({"dtype": "float16"}, "does not fit its inputs at layer 7"),
        ({"shape": []}, "the conv states of decoder.onnx are empty"),
        ({"shape": [4, 0]}, "the conv states of decoder.onnx are empty"),
    ):
        graph["states"] = [{**state, **change}]
        with pytest.raises(VtpError, match=problem):
            parse_manifest(json.dumps(data))
    graph["states"] = [state]
    del graph["outputs"]["present_conv.7"]
    with pytest.raises(VtpError, match=r"decoder\.onnx does not give present_conv\.7"):
        parse_manifest(json.dumps(data))
    graph["kv"] = None
    with pytest.raises(VtpError, match="has states and no cache to tell their lengths"):
        parse_manifest(json.dumps(data))
