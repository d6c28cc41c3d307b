"""Decoders in dynamic int8, and graphs that read prompts on the cache of another."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from vtp.calib import cli
from vtp.calib.data import Sample
from vtp.calib.quantize.layers import DynamicInt8, Int4, Layer, find_layers, load_graph, rewrite
from vtp.calib.quantize.prompts import prompt_changes, reads_one_row
from vtp.calib.quantize.quantizer import Quantizer, Wish
from vtp.calib.quantize.weight_store import Store, place_of
from vtp.engines import UsageError, VtpError, open_graph
from vtp.engines.ort.needs import unguarded_products
from vtp.export.layouts.transformers_js.served import check_manifest
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.bundle.manifest import parse_manifest
from vtp.runtime.bundle.memory import bundle_memory
from vtp.runtime.preprocess import preprocess
from vtp.runtime.result import Timings
from vtp.runtime.scheduler import Scheduler
from vtp.runtime.stages.runner import Row, StageRunner

from ..oracles.onnxruntime_1_23 import too_new

IDS = [1, 5, 9, 4, 11, 3]


@pytest.fixture(scope="module")
def fewer(tmp_path_factory: pytest.TempPathFactory, exported: Any, picture_file: Path) -> Callable[..., Path]:
    """Makes a bundle in fewer bits as `Wish` says, once for each wish."""
    made: dict[tuple[str, Wish], Path] = {}

    def make(name: str, wish: Wish) -> Path:
        if (name, wish) not in made:
            folder = tmp_path_factory.mktemp("fewer") / name
            quantizer = Quantizer(open_bundle(exported(name).folder), wish)
            samples = [Sample(picture_file, "what color is it ?")]
            quantizer.observe(folder.parent / "probe", samples, "ort-cpu", 1, lambda _: None)
            folder.mkdir()
            quantizer.write(folder, set())
            made[name, wish] = folder
        return made[name, wish]

    return make


WITH_PROMPTS = Wish("none", "int4", prompt="int8")


def by_rows(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """What dynamic int8 means, one number at a time: codes of both sides, whole sums, and their scales."""
    columns = [np.float32(np.abs(column).max()) / np.float32(127) for column in weight.T]
    found = np.zeros((len(rows), weight.shape[1]))
    for place, row in enumerate(rows):
        step = np.float32(np.abs(row).max()) * np.float32(1 / 127)
        codes = [int(np.rint(one / step)) if step else 0 for one in row]
        for number, (column, scale) in enumerate(zip(weight.T, columns, strict=True)):
            total = sum(code * int(np.rint(one / scale)) for code, one in zip(codes, column, strict=True))
            found[place, number] = float(total) * float(scale) * float(step)
    return found


def test_products_are_those_of_int8_codes_by_row(tmp_path: Path) -> None:
    """Two that read the same become one; a transposed one keeps its bias; rows of zeros and huge rows."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 3, 32)).astype(np.float32) * 10.0 ** rng.integers(-6, 7, (2, 3, 1))
    values = values.astype(np.float32)
    values[1, 2] = 0
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    bias = np.arange(8, dtype=np.float32)
    nodes = [helper.make_node("MatMul", ["x", name], [f"y_{name}"], name) for name in "ab"]
    nodes.append(helper.make_node("Reshape", ["x", "flat"], ["rows"], "reshape"))
    nodes.append(helper.make_node("Gemm", ["rows", "c", "bias"], ["y_c"], "c", transB=1))
    infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", 32])]
    wanted = {"y_a": ["batch", "sequence", 16], "y_b": ["batch", "sequence", 4], "y_c": ["n", 8]}
    out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in wanted.items()]
    parts = [numpy_helper.from_array(weight, name) for name, weight in weights.items()]
    parts += [
        numpy_helper.from_array(bias, "bias"),
        numpy_helper.from_array(np.array([-1, 32], np.int64), "flat"),
    ]
    graph = helper.make_graph(nodes, "g", infos, out, parts)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    layers = find_layers(model, "g.onnx")
    rewrite(model, [DynamicInt8(layer) for layer in layers], Store(tmp_path, tmp_path), "g.onnx")
    onnx.save(model, tmp_path / "g.onnx")
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("MatMulIntegerToFloat") == 2 and "MatMul" not in operators
    assert unguarded_products(tmp_path / "g.onnx", "1.23.2") == ""
    assert too_new(tmp_path / "g.onnx") == []
    engine = open_graph(tmp_path / "g.onnx", "ort-cpu", 1)
    found = {name: one.numpy() for name, one in engine.run({"x": engine.put(values)}).items()}
    rows = values.reshape(-1, 32)
    for name, weight in {"a": weights["a"], "b": weights["b"], "c": weights["c"].T}.items():
        given = found[f"y_{name}"].reshape(len(rows), -1) - (bias if name == "c" else 0)
        want = by_rows(rows, weight)
        # of each row's largest: a bias among numbers of 1e6 takes their last digits
        size = np.abs(want).max(axis=1, keepdims=True) + (8 if name == "c" else 0)
        assert (np.abs(given - want) <= 2e-6 * size).all(), name


def test_a_product_of_a_product_has_codes_of_its_own(tmp_path: Path) -> None:
    """As in a weight that was taken apart into two: the first one's result is what the second one rounds."""
    rng = np.random.default_rng(1)
    parts = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in FACTORS.items()}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["z"], "a"),
        helper.make_node("MatMul", ["z", "b"], ["y"], "b"),
    ]
    info = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])]
    made = [numpy_helper.from_array(weight, name) for name, weight in parts.items()]
    graph = helper.make_graph(nodes, "g", info, out, made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    changes = [DynamicInt8(layer) for layer in find_layers(model, "g.onnx")]
    rewrite(model, changes, Store(tmp_path, tmp_path), "g.onnx")
    onnx.save(model, tmp_path / "g.onnx")
    values = rng.standard_normal((6, 32)).astype(np.float32)
    engine = open_graph(tmp_path / "g.onnx", "ort-cpu", 1)
    found = engine.run({"x": engine.put(values)})["y"].numpy()
    want = by_rows(by_rows(values, parts["a"]).astype(np.float32), parts["b"])
    assert np.abs(found - want).max() < 2e-2 * np.abs(want).max()  # a code between two may go either way


FACTORS = {"a": (32, 8), "b": (8, 16)}
SHAPES = {"a": (32, 16), "b": (32, 4), "c": (8, 32)}


def plain_step(folder: Path, file: str, feeds: dict[str, Any], kv: Any) -> dict[str, np.ndarray]:
    """One run of a decoder graph by onnxruntime alone, on arrays; the cache comes back longer."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # see docs/plain.md
    session = onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(None, {**feeds, **kv}), strict=True))


def test_prompts_and_steps_share_one_cache(fewer: Callable[..., Path], picture: Image.Image) -> None:
    """The prompt is what its graph makes of it, the step what the other makes of that cache."""
    folder = fewer("vispruner", WITH_PROMPTS)
    manifest = open_bundle(folder, check_hashes=True).manifest
    assert manifest.graphs["decoder_prompt.onnx"].cache_of == "decoder.onnx"
    assert [stage.file for stage in manifest.stages_of("decoder")] == ["decoder_prompt.onnx", "decoder.onnx"]
    runner = StageRunner(open_bundle(folder), "ort-cpu", 1)
    assert list(runner.caches) == ["decoder.onnx"]
    pixels = preprocess(picture, manifest.image)
    values = runner.prefill(3, pixels, IDS, 1, Timings())
    first = values["logits"].numpy()
    assert runner.caches["decoder.onnx"].length == values["prompt_embeds"].shape[1]
    graph = manifest.graphs["decoder.onnx"]
    empty = {
        name: np.zeros(
            [1, *[size if isinstance(size, int) else graph.kv.capacity for size in spec.shape[1:]]]
        )
        for name, spec in graph.inputs.items()
        if name.startswith("past_key_values.")
    }
    empty = {name: array.astype(np.float32) for name, array in empty.items()}
    count = values["prompt_embeds"].shape[1]
    lengths = {
        "seqlens_k": np.array([count - 1], np.int32),
        "total_sequence_length": np.array(count, np.int32),
    }
    feeds = {"inputs_embeds": values["prompt_embeds"].numpy(), "position_ids": values["position_ids"].numpy()}
    read = plain_step(folder, "decoder_prompt.onnx", {**feeds, **lengths}, empty)
    assert np.array_equal(read["logits"], first)
    other = plain_step(folder, "decoder.onnx", {**feeds, **lengths}, empty)
    assert not np.array_equal(other["logits"], first)  # in other bits
    token, place = int(first[0, 0].argmax()), int(values["next_position"].numpy()[0])
    embed = onnxruntime.InferenceSession(
        str(folder / "embed_tokens.onnx"), providers=["CPUExecutionProvider"]
    )
    row = embed.run(None, {"input_ids": np.array([[token]], np.int64)})[0]
    kv = {graph_in: read[to] for graph_in, to in graph.carried.items()}
    lengths = {
        "seqlens_k": np.array([count], np.int32),
        "total_sequence_length": np.array(count + 1, np.int32),
    }
    feeds = {"inputs_embeds": row, "position_ids": np.array([[place]], np.int64)}
    want = plain_step(folder, "decoder.onnx", {**feeds, **lengths}, kv)["logits"][0, 0]
    assert np.array_equal(runner.step(3, token, place), want)
    runner.close()


def test_a_prompt_without_pictures_is_read_by_the_same_graph(fewer: Callable[..., Path]) -> None:
    runner = StageRunner(open_bundle(fewer("vispruner", WITH_PROMPTS)), "ort-cpu", 1)
    files = []
    for opened in [runner._opened.reading(stage) for stage in runner.stages("step", 3)]:
        files.append(opened.info.file)
        assert opened.cache is runner.caches.get("decoder.onnx") or opened.info.role == "embed"
    assert files == ["embed_tokens.onnx", "decoder_prompt.onnx"]
    first = runner.prefill_rows(3, [], [Row(IDS, [])], Timings())["logits"].numpy()
    runner.step(3, 5, len(IDS))
    again = runner.prefill_rows(3, [], [Row(IDS, [])], Timings())["logits"].numpy()
    assert np.array_equal(first, again)
    runner.close()


@pytest.mark.parametrize("name", ["vispruner", "fastv"])
def test_many_at_once_answer_as_one_alone(fewer: Callable[..., Path], picture_file: Path, name: str) -> None:
    """The scheduler reads prompts in rows of the cache that steps share; fastv has two decoder graphs."""
    folder = fewer(name, WITH_PROMPTS)
    twins = {file for file in open_bundle(folder).manifest.files if file.endswith("_prompt.onnx")}
    assert len(twins) == (2 if name == "fastv" else 1)
    questions = [f"what is {word} ?" for word in ("it", "this thing", "that red thing over there", "he")]
    with Pipeline.load(folder, threads=1) as pipe:
        alone = [pipe.generate(picture_file, one, max_new_tokens=6).token_ids for one in questions]
    with Scheduler.load(folder, threads=1, slots=3) as scheduler:
        tickets = [scheduler.submit(picture_file, one, max_new_tokens=6) for one in questions]
        assert [ticket.result().token_ids for ticket in tickets] == alone


@pytest.mark.parametrize(
    "engine",
    [
        "openvino-cpu",
        "ort-cpu,decoder=openvino-cpu",
        "ort-cpu,decoder_prompt.onnx=openvino-cpu",
        "openvino-cpu,decoder_prompt.onnx=ort-cpu",
    ],
)
def test_openvino_shares_the_cache_as_well(
    fewer: Callable[..., Path], picture_file: Path, engine: str
) -> None:
    """Alone, for the decoder alone, or for one of a cache's two graphs: the tokens of ONNX Runtime, several
    steps long, of prompts alone and in the slots of a scheduler."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    folder = fewer("vispruner", WITH_PROMPTS)
    questions = ["what color is it ?", "what ?", "is it red ?"]
    found = []
    for one in ("ort-cpu", engine):
        with Pipeline.load(folder, engine=one, threads=1) as pipe:
            alone = [pipe.generate(picture_file, text, max_new_tokens=8).token_ids for text in questions]
            engines = pipe.engines
        with Scheduler.load(folder, engine=one, threads=1, slots=2) as scheduler:
            tickets = [scheduler.submit(picture_file, text, max_new_tokens=8) for text in questions]
            found.append((alone, [ticket.result().token_ids for ticket in tickets]))
    assert len(found[0][0][0]) > 1 and found[0] == found[1]
    first, other = engines["decoder"], engines.get("decoder.onnx", engines["decoder"])
    assert "openvino-cpu" in (first, other)
    if "decoder_prompt.onnx=" in engine:
        assert f"decoder_prompt.onnx={first}" in engine and other == engine.partition(",")[0] != first


def test_transformers_js_has_one_decoder_graph(fewer: Callable[..., Path]) -> None:
    folder = fewer("vispruner", WITH_PROMPTS)
    with pytest.raises(UsageError, match=r"one decoder graph, and the bundle .* has two \(--prompt int8\)"):
        check_manifest(open_bundle(folder).manifest, folder)


def test_a_prompt_is_read_on_from_one_that_began_alike(
    fewer: Callable[..., Path], picture_file: Path
) -> None:
    folder = fewer("vispruner", WITH_PROMPTS)
    with Pipeline.load(folder, threads=1) as pipe:
        plain = pipe.generate(picture_file, "what color is it then ?", max_new_tokens=5)
    with Pipeline.load(folder, threads=1, prefix_caching=True) as pipe:
        pipe.generate(picture_file, "what color is this ?", max_new_tokens=5)
        reused = pipe.generate(picture_file, "what color is it then ?", max_new_tokens=5)
    assert reused.timings.reused_tokens > 0 and reused.token_ids == plain.token_ids


def test_nothing_is_stored_twice_and_a_head_stays_as_it_is(fewer: Callable[..., Path], exported: Any) -> None:
    """Beside the int8 codes there is nothing new; the head sees one row of a prompt, and stays int4."""
    plain, folder = (fewer("vispruner", wish) for wish in (Wish("none", "int4"), WITH_PROMPTS))
    source = exported("vispruner").folder
    decoder, prompts = (load_graph(folder / name) for name in ("decoder.onnx", "decoder_prompt.onnx"))
    kinds = [node.op_type for node in prompts.graph.node]
    # Three layers: query, key and value in one product, gate and up in one; output, down.
    assert kinds.count("MatMulIntegerToFloat") == 3 * 4 and kinds.count("MatMulNBits") == 1
    places = {place_of(item) for item in decoder.graph.initializer} - {None}
    shared = [place_of(item) for item in prompts.graph.initializer if place_of(item) in places]
    assert (
        shared and (folder / "decoder.onnx.data").read_bytes() == (plain / "decoder.onnx.data").read_bytes()
    )
    layers = find_layers(load_graph(source / "decoder.onnx"), "decoder.onnx")
    head = [layer for layer in layers if reads_one_row(layer, load_graph(source / "decoder.onnx"))]
    codes = sum(layer.shape[0] * layer.shape[1] for layer in layers if layer not in head)
    assert len(head) == 1 and codes <= (folder / "decoder_prompt.onnx.data").stat().st_size < 1.3 * codes
    told = {stage.file: stage for stage in bundle_memory(open_bundle(folder), "ort-cpu").stages}
    assert told["decoder_prompt.onnx"].cache == 0 < told["decoder.onnx"].cache
    assert told["decoder_prompt.onnx"].weights >= codes
    # One of them reads all of a prompt, the other one token.
    assert 0 < 50 * told["decoder.onnx"].activations < told["decoder_prompt.onnx"].activations


def test_a_loud_layer_keeps_those_that_read_the_same_in_int4() -> None:
    layers = [
        Layer("d.onnx", name, source, f"y_{name}", f"w_{name}", f"p_{name}", (32, 8), False, "float32")
        for name, source in (("q", "x"), ("k", "x"), ("o", "z"))
    ]
    changes = [Int4(layer, np.ones(32), 32, "ort") for layer in layers]
    made = prompt_changes(changes, lambda layer: layer.node != "k")
    assert [type(one) for one in made] == [Int4, Int4, DynamicInt8]
    assert made[:2] == changes[:2]


def test_how_loud_a_row_s_rounding_is_told_from_sums(
    exported: Any, picture_file: Path, tmp_path: Path
) -> None:
    """The estimate, of sums alone, against the noise of the products themselves on the rows of a prompt."""
    quantizer = Quantizer(open_bundle(exported("vispruner").folder), Wish("none", "int8"))
    samples = [Sample(picture_file, "what color is it ?")]
    quantizer.observe(tmp_path / "probe", samples, "ort-cpu", 1, lambda _: None)
    judged = [one for one in quantizer.judged if not one.left]
    assert judged and all(25 < one.decibels < 60 for one in judged)
    rng = np.random.default_rng(0)
    layer = next(one for one in judged if one.layer.shape[0] >= 32).layer
    rows = rng.standard_normal((64, layer.shape[0])).astype(np.float32)
    weight = rng.standard_normal(layer.shape).astype(np.float32)
    seen = quantizer._seen
    seen[layer.file, layer.source].energy = np.square(rows).sum(0)
    seen[layer.file, layer.source].peaks = float(np.square(np.abs(rows).max(1)).sum())
    seen[layer.file, layer.output].signal = float(np.square(rows @ weight).sum())
    told = quantizer._loudness_by_row(layer, weight)
    noise = np.square(by_rows(rows, weight) - rows @ weight).sum()
    assert abs(told - 10 * np.log10(np.square(rows @ weight).sum() / noise)) < 0.5


def test_a_decoder_in_int8_is_one_graph(
    fewer: Callable[..., Path], exported: Any, picture: Image.Image
) -> None:
    folder = fewer("vispruner", Wish("none", "int8", head="int8"))
    manifest = open_bundle(folder, check_hashes=True).manifest
    assert set(manifest.graphs) == set(open_bundle(exported("vispruner").folder).manifest.graphs)
    kinds = [node.op_type for node in load_graph(folder / "decoder.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 3 * 4 + 1 and not {"MatMul", "Gemm", "MatMulNBits"} & {
        *kinds
    }
    source = exported("vispruner").folder
    sizes = [(one / "decoder.onnx.data").stat().st_size for one in (folder, source)]
    assert sizes[0] < 0.3 * sizes[1]
    pixels, logits = preprocess(picture, manifest.image), []
    for one in (folder, source):
        runner = StageRunner(open_bundle(one), "ort-cpu", 1)
        logits.append(runner.prefill(3, pixels, IDS, 1, Timings())["logits"].numpy()[0, 0].astype(np.float64))
        runner.close()
    few, whole = logits
    assert few @ whole > 0.995 * np.linalg.norm(few) * np.linalg.norm(whole)


def test_one_graph_reads_prompts_on_a_cache(fewer: Callable[..., Path]) -> None:
    data = json.loads((fewer("vispruner", WITH_PROMPTS) / "manifest.json").read_text())
    data["files"]["x.onnx"] = data["files"]["decoder_prompt.onnx"]
    data["graphs"]["x.onnx"] = data["graphs"]["decoder_prompt.onnx"]
    with pytest.raises(VtpError, match=r"several graphs work on the cache of decoder\.onnx|x\.onnx works on"):
        parse_manifest(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_of": "lost.onnx"}, "works on the cache of 'lost.onnx', which has none of its own"),
        ({"cache_of": "decoder_prompt.onnx"}, "which has none of its own"),
        ({"cache_of": "splice.onnx"}, "which has none of its own"),
        ({"cache_of": None}, "the cache of decoder.onnx is one that steps read and prompts do not, at 3"),
        ({"cache_of": 7}, "cache_of should be"),
        ({"axes": {}}, "works on the cache of decoder.onnx and differs from it"),
        (None, "works on the cache of decoder.onnx, but they do not read prompts and take steps"),
        ({"kv": {"capacity": 9}}, "works on the cache of decoder.onnx and differs from it"),
    ],
)
def test_caches_that_do_not_fit_are_refused(fewer: Callable[..., Path], change: Any, message: str) -> None:
    text = (fewer("vispruner", WITH_PROMPTS) / "manifest.json").read_text()
    assert parse_manifest(text).to_json() == text
    data = json.loads(text)
    graph = data["graphs"]["decoder_prompt.onnx"]
    if change is None:
        for stage in data["stages"]:
            stage["file"] = stage["file"].replace("decoder.onnx", "decoder_prompt.onnx")
    for name, value in (change or {}).items():
        graph[name] = {**graph[name], **value} if value and isinstance(value, dict) else value
    with pytest.raises(VtpError, match=message):
        parse_manifest(json.dumps(data))


def test_prompts_have_one_graph_of_their_own(
    fewer: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle whose record was lost is quantised no second time."""
    folder = Path(shutil.copytree(fewer("vispruner", WITH_PROMPTS), tmp_path / "small"))
    manifest = dataclasses.replace(open_bundle(folder).manifest, quantization={})
    (folder / "manifest.json").write_text(manifest.to_json())
    assert cli.main(["quantize", str(folder), "--data", str(tmp_path / "none.jsonl")]) == 2
    assert f"{folder} is quantised already (into what it does not say); give" in capsys.readouterr().err
