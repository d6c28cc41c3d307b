"""vtp-calib quantize on real bundles: what it writes, what it leaves in float, what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from vtp.calib import cli
from vtp.calib.data import Sample
from vtp.calib.quantize import command as quantize
from vtp.calib.quantize import observe
from vtp.calib.quantize.layers import Int4, Int8, find_layers, load_graph, read_apart, rewrite
from vtp.calib.quantize.quantizer import Quantizer, Wish
from vtp.calib.quantize.rounding import Range
from vtp.calib.quantize.weight_store import Store, place_of
from vtp.engines import open_graph
from vtp.engines.graph.file import read_graph
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle

from ..oracles.onnxruntime_1_23 import too_new

BITS = ["--max-new-tokens", "4", "--threads", "1", "--samples", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, exported: Any) -> Path:
    """Ten questions about ten pictures; the accepted answers are what the pruned bundle says in float."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(3)
    with (
        Pipeline.load(exported("vispruner").folder, threads=1) as pipe,
        (folder / "d.jsonl").open("w") as out,
    ):
        for number in range(10):
            picture = folder / f"{number}.png"
            Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(picture)
            text = pipe.generate(picture, f"what is {number} ?", max_new_tokens=4).text
            line = {"image": picture.name, "prompt": f"what is {number} ?", "answer": text}
            out.write(json.dumps(line) + "\n")
    return folder / "d.jsonl"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, exported: Any, data: Path) -> Path:
    """A bundle quantised whole, whatever it costs: random models lose more than trained ones."""
    folder = tmp_path_factory.mktemp("made") / "small"
    source = exported("vispruner").folder
    arguments = [source, "--data", data, "--output", folder, "--force", "--out", folder.parent / "report"]
    assert calib(*arguments) == 0
    return folder


def calib(*arguments: object) -> int:
    return cli.main(["quantize", *map(str, arguments), *BITS])


def operators(folder: Path, file: str) -> list[str]:
    return [node.op_type for node in load_graph(folder / file).graph.node]


def columns(folder: Path, file: str) -> int:
    """Of all products in int4."""
    nodes = [node for node in load_graph(folder / file).graph.node if node.op_type == "MatMulNBits"]
    return sum(item.i for node in nodes for item in node.attribute if item.name == "N")


def columns_of_layers(folder: Path, file: str) -> int:
    return sum(layer.shape[1] for layer in find_layers(load_graph(folder / file), file))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.data"))


def test_every_layer_is_quantised_and_the_bundle_runs(made: Path, exported: Any, picture: Any) -> None:
    source = exported("vispruner").folder
    manifest = open_bundle(made, check_hashes=True).manifest
    assert "MatMul" in operators(source, "decoder.onnx") and "MatMul" not in operators(made, "decoder.onnx")
    # Three layers: query, key and value in one product, gate and up in one; output, down; and the head.
    assert operators(made, "decoder.onnx").count("MatMulNBits") == 3 * 4 + 1
    assert columns(made, "decoder.onnx") == columns_of_layers(source, "decoder.onnx")
    codes = [node for node in operators(made, "vision_encoder.onnx") if node == "DequantizeLinear"]
    assert len(codes) == 2 * 6 + 2 * 4  # two layers of six weights; q, k and v read one rounded tensor
    assert operators(made, "pruner_3.onnx") == operators(source, "pruner_3.onnx")
    assert size(made) < 0.55 * size(source)
    assert manifest.quantization["bytes"]["after"] < manifest.quantization["bytes"]["before"]
    assert manifest.parity["mode"] == "accuracy" and manifest.parity["questions"] == 6
    assert manifest.parity["other_pictures_than_calibrated_on"] is True
    with Pipeline.load(made, threads=1) as pipe:
        assert len(pipe.generate(picture, "what ?", max_new_tokens=3, keep_tokens=3).kept) == 3
    assert sorted(path.name for path in made.parent.iterdir()) == ["report", "small"]
    assert not [path for path in made.iterdir() if path.name not in (*manifest.files, "manifest.json")]


def test_operations_are_told_as_before(made: Path, exported: Any) -> None:
    """Shapes of what is new are in the graphs: products count the same in fewer bits."""
    for file in ("vision_encoder.onnx", "projector.onnx"):
        counts = [
            {
                (graph.tensors[node.inputs[0]].shape, graph.tensors[node.outputs[0]].shape)
                for node in graph.nodes
                if node.op == "MatMul"
            }
            for graph in (read_graph(folder / file) for folder in (exported("vispruner").folder, made))
        ]
        assert counts[0] == counts[1] != set()


def test_the_report_names_every_layer(made: Path) -> None:
    rows = list(csv.DictReader((made.parent / "report/quantize.csv").open()))
    record = open_bundle(made).manifest.quantization
    assert {row["layer"] for row in rows} == set(record["layers"]) | set(record["left_in_float"])
    assert {row["bits"] for row in rows} == {"int8", "int4"}
    assert all(float(row["signal_to_noise_db"]) > 10 for row in rows)


def test_int8_features_are_near_the_float_ones(made: Path, exported: Any) -> None:
    pixels = np.random.default_rng(2).standard_normal((1, 3, 56, 56)).astype(np.float32)
    found = []
    for folder in (exported("vispruner").folder, made):
        engine = open_graph(folder / "vision_encoder.onnx", "ort-cpu", 1)
        found.append(engine.run({"pixel_values": engine.put(pixels)})["image_features"].numpy())
    assert 0 < np.abs(found[0] - found[1]).max() < 0.1 * np.abs(found[0]).max()


def test_every_graph_opens_on_the_oldest_onnxruntime(made: Path, exported: Any, tmp_path: Path) -> None:
    """`make test-oldest` asks bundles in every precision on a real 1.23.2; here the graphs are read."""
    bundle = open_bundle(exported("float16").folder)
    half = Quantizer(bundle, Wish("int8", "int4"))
    samples = [Sample(picture, "what ?") for picture in (tmp_path / "one.png",)]
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(samples[0].image)
    half.observe(tmp_path / "probe", samples, "ort-cpu", 1, lambda _: None)
    (tmp_path / "half").mkdir()
    half.write(tmp_path / "half", set())
    graphs = [*made.glob("*.onnx"), *(tmp_path / "half").glob("*.onnx")]
    written = {(node.domain, node.op) for path in graphs for node in read_graph(path).nodes}
    assert {("com.microsoft", "QuantizeLinear"), ("com.microsoft", "MatMulNBits")} <= written
    assert [fault for path in graphs for fault in too_new(path)] == []


def test_one_part_alone(exported: Any, data: Path, tmp_path: Path, capsys: Any) -> None:
    source, out = exported("vispruner").folder, tmp_path / "v"
    capsys.readouterr()
    assert calib(source, "--data", data, "--decoder", "none", "--output", out, "--force", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["quantization"]["decoder"] == "none" and said["accuracy"]["metric"] == "exact"
    assert operators(out, "decoder.onnx") == operators(source, "decoder.onnx")
    assert "DequantizeLinear" in operators(out, "projector.onnx")
    old, new = (open_graph(one / "decoder.onnx", "ort-cpu", 1) for one in (source, out))
    assert old.inputs == new.inputs


def test_weights_that_are_shared_stay_shared(exported: Any, data: Path, tmp_path: Path) -> None:
    """AdaptPrune's head reads a projection of the layer after it; a tied head reads the embedding."""
    source, out = exported("tied").folder, tmp_path / "tied"
    assert calib(source, "--data", data, "--vision", "none", "--output", out, "--force") == 0
    left = open_bundle(out).manifest.quantization["left_in_float"]
    assert len(left) == 1 and "not stored twice" in next(iter(left.values()))
    graphs = {file: load_graph(out / file).graph for file in ("decoder.onnx", "embed_tokens.onnx")}
    places = [{place_of(item) for item in graph.initializer} - {None} for graph in graphs.values()]
    assert places[0] & places[1]
    assert codes_of_shared(source, out)
    assert size(out) < size(source)


def codes_of_shared(source: Path, out: Path) -> bool:
    """Whether the projection that two graphs read has the same codes in both."""
    found = []
    for file in ("decoder_head.onnx", "decoder.onnx"):
        layers = {layer.place: layer.weight for layer in find_layers(load_graph(source / file), file)}
        weights = {item.name: item for item in load_graph(out / file).graph.initializer}
        found.append(
            {place: weights[f"{name}__int4"] for place, name in layers.items() if f"{name}__int4" in weights}
        )
    (place,) = set(found[0]) & set(found[1])
    return found[0][place].raw_data == found[1][place].raw_data != b""


def test_a_sensitive_layer_is_found_and_left_in_float(exported: Any, data: Path, tmp_path: Path) -> None:
    """One channel a thousand times as large as the others, undone by the weights: int8 cannot hold both."""
    folder = Path(shutil.copytree(exported("none").folder, tmp_path / "loud"))
    layer = spoil(folder)
    quantizer = Quantizer(open_bundle(folder), Wish("int8", "none"))
    samples = [Sample(data.parent / f"{number}.png", "what ?") for number in range(4)]
    quantizer.observe(tmp_path / "probe", samples, "ort-cpu", 1, lambda _: None)
    left = {one.layer.label for one in quantizer.judged if one.left}
    assert left == {layer}
    assert not (tmp_path / "probe").exists()


@pytest.mark.parametrize("part", [["--decoder", "none"], ["--vision", "none"]])
def test_a_picture_by_which_arithmetic_breaks_is_named(
    exported: Any, data: Path, tmp_path: Path, capsys: Any, part: list[str]
) -> None:
    """As in float16, where an infinite number becomes NaN in what follows; nothing is rounded by such."""
    folder = Path(shutil.copytree(exported("none").folder, tmp_path / "broken"))
    spoil(folder, np.inf)
    (folder / "manifest.json").write_text(open_bundle_anyhow(folder).to_json())
    assert calib(folder, "--data", data, *part, "--output", tmp_path / "o") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    place = "decoder.onnx at " if part[0] == "--vision" else "projector.onnx at scaled"
    assert place in said and "gives values that are NaN or infinite for the picture " in said
    assert str(data.parent / "0.png") in said and "leave the picture out" in said
    assert sorted(path.name for path in tmp_path.iterdir()) in (["broken"], ["broken", "broken-calib"])


def spoil(folder: Path, factor: float = 3000) -> str:
    """Scale one input of the projector's first layer up, and its weights down; returns the layer's label."""
    model = load_graph(folder / "projector.onnx")
    (layer, _) = find_layers(model, "projector.onnx")
    weights = {item.name: item for item in model.graph.initializer}
    matrix = np.array(np.memmap(folder / layer.place[0], np.float32, "r", int(layer.place[1]), layer.shape))
    factors = np.ones(layer.shape[0], np.float32)
    factors[0] = factor
    weights[layer.weight].CopyFrom(numpy_helper.from_array(matrix / factors[:, None], layer.weight))
    model.graph.initializer.append(numpy_helper.from_array(factors, "factors"))
    model.graph.node.insert(0, helper.make_node("Mul", [layer.source, "factors"], ["scaled"], "scale"))
    next(node for node in model.graph.node if node.name == layer.node).input[0] = "scaled"
    onnx.save(model, folder / "projector.onnx")
    manifest = open_bundle_anyhow(folder)
    (folder / "manifest.json").write_text(manifest.to_json())
    return layer.label


def open_bundle_anyhow(folder: Path) -> Any:
    from vtp.runtime.bundle.folder import describe_files
    from vtp.runtime.bundle.manifest import parse_manifest

    manifest = parse_manifest((folder / "manifest.json").read_text())
    return dataclasses.replace(manifest, files=describe_files(folder))


def test_layers_go_back_to_float_until_the_drop_is_allowed(
    exported: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Accuracy that stays low until a quarter of the layers is float; then one that never recovers."""
    tried: list[set[str]] = []
    write = Quantizer.write

    def spy(self: Quantizer, folder: Path, left: set[str]) -> Any:
        tried.append(left)
        return write(self, folder, left)

    def compare(_: Any) -> quantize.Compared:
        return quantize.Compared([1.0] * 4, [1.0 if len(tried) == enough else 0.5] * 4)

    monkeypatch.setattr(Quantizer, "write", spy)
    monkeypatch.setattr(quantize._Trial, "compare", compare)
    enough, source, out = 3, exported("vispruner").folder, tmp_path / "out"
    assert calib(source, "--data", data, "--vision", "none", "-o", out) == 0
    assert [len(left) for left in tried] == [0, 2, 6]  # of 22 layers
    record = open_bundle(out, check_hashes=True).manifest.quantization
    assert set(record["left_in_float"]) == tried[-1]
    left = sum(int(label.rpartition("x")[2].rstrip("]")) for label in tried[-1])  # columns
    assert columns(out, "decoder.onnx") == columns_of_layers(source, "decoder.onnx") - left
    enough, out = 99, tmp_path / "never"
    assert calib(source, "--data", data, "--vision", "none", "--output", out) == 1
    assert "loses 50.0 points" in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_one_picture_at_a_time_is_held(exported: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Twenty questions leave no more behind than ten: rows are bounded, and pictures go as they come."""
    import weakref

    alive: list[weakref.ref[Any]] = []
    prepare = observe.preprocess

    def watched(*arguments: Any) -> Any:
        assert sum(one() is not None for one in alive) <= 1
        pixels = prepare(*arguments)
        alive.append(weakref.ref(pixels))
        return pixels

    monkeypatch.setattr(observe, "preprocess", watched)
    bundle = open_bundle(exported("vispruner").folder)
    layers = find_layers(load_graph(bundle.path("projector.onnx")), "projector.onnx")
    samples = [Sample(data.parent / f"{number % 10}.png", "what ?") for number in range(20)]
    seen = observe.observe(bundle, tmp_path / "p", layers, [], samples, 6, "ort-cpu", 1, lambda _: None)
    assert len(alive) == 20 and len(seen) == 2
    assert all(sum(map(len, one.rows)) <= 256 for one in seen.values())


def test_layers_of_one_input_are_one_product_with_the_same_results(tmp_path: Path) -> None:
    """Bit for bit what ONNX Runtime makes of each alone; a weight in other company elsewhere stays alone."""
    rng = np.random.default_rng(0)
    widths, values = {"q": 48, "k": 16, "v": 16, "o": 32}, rng.standard_normal((5, 64)).astype(np.float32)
    sources = {"q": "x", "k": "x", "v": "x", "o": "z"}
    weights = {name: rng.standard_normal((64, width)).astype(np.float32) for name, width in widths.items()}
    nodes = [helper.make_node("MatMul", [sources[name], f"w_{name}"], [name], name) for name in widths]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in "xz"]
    out = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name, width in widths.items()
    ]
    parts = [numpy_helper.from_array(weight, f"w_{name}") for name, weight in weights.items()]
    plain = helper.make_model(
        helper.make_graph(nodes, "g", infos, out, parts),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    layers = find_layers(plain, "g.onnx")
    changes = [Int4(layer, np.square(values).sum(0), 32, "ort") for layer in layers]
    asked, found = {"x": values, "z": values[::-1].copy()}, {}
    for name, apart in (
        ("joined", set()),
        ("v", {layers[2].place}),
        ("single", {layer.place for layer in layers}),
    ):
        model = onnx.ModelProto()
        model.CopyFrom(plain)
        (tmp_path / name).mkdir()
        rewrite(model, changes, Store(tmp_path, tmp_path / name), "g.onnx", apart)
        onnx.save(model, tmp_path / name / "g.onnx")
        engine = open_graph(tmp_path / name / "g.onnx", "ort-cpu", 1)
        run = engine.run({key: engine.put(value) for key, value in asked.items()})
        found[name] = {key: value.numpy() for key, value in run.items()}
    counts = {name: operators(tmp_path / name, "g.onnx").count("MatMulNBits") for name in found}
    assert counts == {"joined": 2, "v": 3, "single": 4}
    for name in ("joined", "v"):
        assert all(np.array_equal(found[name][key], found["single"][key]) for key in widths), name
    elsewhere = [Int4(layers[2], np.square(values).sum(0), 32, "ort")]
    assert read_apart([changes, elsewhere]) == {layers[2].place} and read_apart([changes, changes]) == set()


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_a_gemm_keeps_its_bias(tmp_path: Path, bits: str, target: str) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((16, 32)).astype(np.float32), np.arange(16, dtype=np.float32)
    values = rng.standard_normal((5, 32)).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)
    infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])]
    parts = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    graph = helper.make_graph([node], "g", infos, out, parts)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    (layer,) = find_layers(model, "g.onnx")
    assert layer.shape == (32, 16) and layer.transposed
    seen = Range()
    seen.add(values)
    energy = np.square(values).sum(0)
    change = Int8(layer, seen, "int8", target) if bits == "int8" else Int4(layer, energy, 32, target)
    rewrite(model, [change], Store(tmp_path, tmp_path), "g.onnx")
    onnx.save(model, tmp_path / "g.onnx")
    standard = (bits, target) == ("int8", "tensorrt")  # whose engine has QuantizeLinear of every opset
    assert too_new(tmp_path / "g.onnx") == (["::QuantizeLinear"] if standard else [])
    engine = open_graph(tmp_path / "g.onnx", "ort-cpu", 1)
    found = engine.run({"x": engine.put(values)})["y"].numpy()
    want = values @ weight.T + bias
    assert np.sqrt(np.square(found - want).mean()) < (0.1 if bits == "int8" else 0.6)


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["--vision", "fp8"], 2, "NVIDIA ModelOpt, which needs an environment of its own"),
        (["--decoder", "int4-awq"], 2, "NVIDIA ModelOpt"),
        (["--vision", "int4"], 2, "--vision int4 is not known; choose one of int8, none"),
        (["--vision", "none", "--decoder", "none"], 2, "leaves nothing to quantise"),
        (["--head", "int2"], 2, "--head int2 is not known; choose one of float, int4"),
        (["--block", "16"], 2, "--block 16 is not one of 32, 64, 128"),
        (["--samples", "0"], 2, "--samples 0"),
        (["--max-drop", "-1"], 2, "outside 0 to 100"),
        (["--activations", "int16"], 2, "--activations int16"),
        (["--output", "BUNDLE"], 2, "is the bundle itself"),
        (["--data", "EMPTY"], 2, "holds no question"),
        (["--data", "LOST"], 2, "which does not exist"),
        (["--data", "WRONG"], 2, "neither a string nor a list of strings"),
    ],
)
def test_bad_input_is_one_line(exported, data, tmp_path, capsys, arguments, code, problem) -> None:
    for name, text in (("EMPTY", ""), ("LOST", '"x.png"'), ("WRONG", f'"{data.parent}/0.png", "answer": 3')):
        line = f'{{"image": {text}, "prompt": "x"}}' if text else ""
        (tmp_path / f"{name}.jsonl").write_text(line)
    bundle = exported("vispruner").folder
    places = {name: str(tmp_path / f"{name}.jsonl") for name in ("EMPTY", "LOST", "WRONG")}
    places["BUNDLE"] = str(bundle)
    out = [] if "--output" in arguments else ["--output", str(tmp_path / "o")]
    given = ["--data", str(data), *out, *(places.get(word, word) for word in arguments)]
    assert cli.main(["quantize", str(bundle), *given]) == code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert problem in said and said.startswith("vtp-calib quantize: error: ")
    assert not (tmp_path / "o").exists()


def test_quantised_and_foreign_bundles_are_refused(
    made: Path, exported: Callable[[str], Any], data: Path, tmp_path: Path, capsys: Any
) -> None:
    assert calib(made, "--data", data, "--output", tmp_path / "o") == 2
    assert "is quantised already (vision int8, decoder int4)" in capsys.readouterr().err
    strange = Path(shutil.copytree(exported("vispruner").folder, tmp_path / "strange"))
    record = {"vision": "\x1b[31m\n" * 99, "prompt": ["int8"] * 99}
    manifest = dataclasses.replace(open_bundle(strange).manifest, quantization=record)
    (strange / "manifest.json").write_text(manifest.to_json())
    assert calib(strange, "--data", data, "--output", tmp_path / "o") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said and len(said) < 400 + len(str(strange))
    other = Path(shutil.copytree(exported("vispruner").folder, tmp_path / "other"))
    manifest = dataclasses.replace(open_bundle(other).manifest, target="jetpack6")
    (other / "manifest.json").write_text(manifest.to_json())
    assert calib(other, "--data", data, "--output", tmp_path / "o") == 2
    assert "reads opset 20; int4 came with 21: add --decoder none" in capsys.readouterr().err
    assert calib(exported("stc").folder, "--data", data, "--output", tmp_path / "x") == 2
    assert "(--tower stc), and that is not quantised: add --vision none" in capsys.readouterr().err


def test_questions_are_split_by_picture() -> None:
    samples = [Sample(Path(f"{number // 4}.png"), f"q{number}") for number in range(40)]
    chosen, rest = quantize.split(samples, 3)
    assert [one.image.stem for one in chosen] == ["0", "3", "6"] and len(rest) == 28
    assert not {one.image for one in chosen} & {one.image for one in rest}
    few, all_of_them = quantize.split(samples, 8)
    assert len(few) == 8 and all_of_them == samples


def test_the_times_that_are_told_are_those_of_the_ratio() -> None:
    """One slow turn moves neither."""
    timed = quantize.Timed([120.0, 100.0, 900.0], [100.0, 80.0, 100.0])
    assert timed.faster.value == 1.2 and timed.faster.low <= 1.2 <= timed.faster.high
