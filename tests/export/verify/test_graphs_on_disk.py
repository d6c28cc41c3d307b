"""What a bundle's graphs are on disk: weights stored once, operators, names, opset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors import safe_open

from vtp.runtime.bundle.folder import open_bundle

from ...oracles.onnxruntime_1_23 import too_new


def load_graphs(folder: Path) -> dict[str, onnx.ModelProto]:
    return {path.stem: onnx.load(path, load_external_data=False) for path in sorted(folder.glob("*.onnx"))}


def external(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    place = {entry.key: entry.value for entry in tensor.external_data}
    return place["location"], int(place["offset"]), int(place["length"])


def externals(folder: Path) -> Iterator[tuple[str, onnx.TensorProto, tuple[str, int, int]]]:
    for name, model in load_graphs(folder).items():
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                yield name, tensor, external(tensor)


@pytest.mark.parametrize("name", ["none", "adaptprune", "tied", "qwen2", "float16", "siglip"])
def test_no_weight_is_stored_twice(exported: Callable[[str], Any], name: str) -> None:
    made = exported(name)
    places: dict[bytes, tuple[str, int, int]] = {}
    for _, tensor, place in externals(made.folder):
        file, offset, length = place
        data = (made.folder / file).read_bytes()[offset : offset + length]
        assert len(data) == length
        known = places.setdefault(bytes([tensor.data_type]) + data, place)
        assert known == place, f"{tensor.name} lies at {known} and at {place}"
    stored = {(file, offset): length for file, offset, length in places.values()}
    padding = 4096 * len(stored)
    sizes = sum((made.folder / file).stat().st_size for file in {file for file, _ in stored})
    assert sizes <= sum(stored.values()) + padding


@pytest.mark.parametrize("name", ["none", "adaptprune", "tied", "qwen2", "mistral"])
def test_the_bundle_is_no_larger_than_the_checkpoint(exported: Callable[[str], Any], name: str) -> None:
    """External data holds at most the checkpoint's own numbers: no transposed or folded copies."""
    made = exported(name)
    with safe_open(made.model / "model.safetensors", "pt") as file:
        largest = sum(file.get_tensor(key).numel() * 4 for key in file.keys())  # noqa: SIM118
    stored = sum({(place[0], place[1]): place[2] for _, _, place in externals(made.folder)}.values())
    assert stored <= largest


def test_tied_head_and_embedding_share_bytes(exported: Callable[[str], Any]) -> None:
    folder = exported("tied").folder
    embedding = {place for name, _, place in externals(folder) if name == "embed_tokens"}
    assert len(embedding) == 1
    assert embedding <= {place for name, _, place in externals(folder) if name == "decoder"}


def test_head_and_decoder_share_the_key_projection(exported: Callable[[str], Any]) -> None:
    folder = exported("adaptprune").folder
    places = {
        name: {place for graph, _, place in externals(folder) if graph == name}
        for name in ("decoder_head", "decoder")
    }
    shared = places["decoder_head"] & places["decoder"]
    assert len(shared) == 1
    assert next(iter(shared))[2] == 32 * 16 * 4  # width x kv_heads x head_dim, float32


def test_external_data_stays_in_the_bundle(exported: Callable[[str], Any]) -> None:
    made = exported("adaptprune")
    files = open_bundle(made.folder).manifest.files
    assert {place[0] for _, _, place in externals(made.folder)} <= set(files)


def test_the_last_tower_layer_is_not_in_the_graph(exported: Callable[[str], Any]) -> None:
    """vision_feature_layer -2 of three layers: the third one's weights are nowhere in the bundle."""
    made = exported("none")
    stored = set()
    for _, _, (file, offset, length) in externals(made.folder):
        stored.add((made.folder / file).read_bytes()[offset : offset + length])
    layers = Counter()
    with safe_open(made.model / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if "vision_tower" in key and "encoder.layers." in key and key.endswith("mlp.fc1.weight"):
                tensor = file.get_tensor(key)
                found = {tensor.numpy().tobytes(), tensor.T.contiguous().numpy().tobytes()} & stored
                layers[key.split("encoder.layers.")[1][0]] += bool(found)
        head = [key for key in file.keys() if "post_layernorm" in key]  # noqa: SIM118
    assert layers == {"0": 1, "1": 1, "2": 0}
    assert head  # the checkpoint has it


# What the decoder graphs hold today; a new operator is a decision, for every engine must run it.
DECODER_OPS = {
    *("Add", "Cast", "Clip", "Concat", "Cos", "Expand", "Gather", "GatherElements", "Gemm"),
    *("GroupQueryAttention", "LessOrEqual", "MatMul", "Mul", "Not", "RMSNormalization", "Range"),
    *("ReduceMean", "Reshape", "RotaryEmbedding", "Shape", "Sigmoid", "Sin", "Slice", "Softmax"),
    *("Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
}
NEVER = {"Loop", "If", "Scan", "NonZero", "Compress", "GatherND", "Unique", "NonMaxSuppression", "SequenceAt"}


def operators(model: onnx.ModelProto) -> set[tuple[str, str]]:
    return {(node.domain, node.op_type) for node in model.graph.node}


@pytest.mark.parametrize("name", ["none", "qwen2", "adaptprune", "tied", "float16"])
def test_decoder_graphs_hold_expected_operators_only(exported: Callable[[str], Any], name: str) -> None:
    for graph, model in load_graphs(exported(name).folder).items():
        if graph.startswith("decoder"):
            found = operators(model)
            assert {op for _, op in found} <= DECODER_OPS
            assert {op for domain, op in found if domain} == {"GroupQueryAttention"}
            layers = sum(node.op_type == "GroupQueryAttention" for node in model.graph.node)
            assert layers == sum(value.name.endswith(".key") for value in model.graph.input)
            # Plain attention appears only where a method reads one row of it.
            assert ("", "Softmax") not in found or graph == "decoder_head"


@pytest.mark.parametrize(
    "name", ["none", "vispruner", "original", "adaptprune", "fastv", "siglip", "float16"]
)
def test_all_graphs_are_opset_23_without_control_flow(exported: Callable[[str], Any], name: str) -> None:
    for graph, model in load_graphs(exported(name).folder).items():
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == 23
        assert too_new(exported(name).folder / f"{graph}.onnx") == []
        assert not model.functions
        assert not NEVER & {op for _, op in operators(model)}
        if not graph.startswith("decoder"):
            assert {domain for domain, _ in operators(model)} == {""}, f"{graph} uses custom operators"


def test_graphs_tell_nothing_of_the_machine_that_made_them(exported: Callable[[str], Any]) -> None:
    here = str(Path(__file__).parents[3]).encode()
    for name, model in load_graphs(exported("adaptprune").folder).items():
        content = model.SerializeToString()
        assert not any(trace in content for trace in (here, b"site-packages", b".py")), name


def test_names_users_see(exported: Callable[[str], Any]) -> None:
    graphs = load_graphs(exported("adaptprune").folder)
    assert {"vision_encoder", "projector", "embed_tokens", "splice", "decoder_head", "decoder"} <= set(graphs)
    assert {"pruner_4", "pruner_7"} <= set(graphs)

    def axes(name: str, place: str) -> dict[str, list[Any]]:
        values = getattr(graphs[name].graph, place)
        return {
            value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in values
        }

    assert axes("vision_encoder", "input") == {"pixel_values": ["batch", 3, 56, 56]}
    assert axes("vision_encoder", "output") == {"image_features": ["batch", 16, 32]}
    assert axes("projector", "input") == {"image_features": ["batch", "visual", 32]}
    assert axes("pruner_4", "output")["keep_indices"] == ["batch", 4]
    assert axes("decoder", "output")["logits"] == ["batch", 1, 384]
    assert axes("decoder", "input")["past_key_values.2.key"] == ["batch", 2, "capacity", 8]
    assert axes("decoder_head", "output")["hidden_states"] == ["batch", "sequence", 32]
