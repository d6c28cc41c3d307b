"""Bundles against transformers: tokens, logits and cache lengths; each weight once, expected operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, Qwen3Config

from vtp.engines import Value, VtpError, open_graph
from vtp.export.exporter import Request, export
from vtp.export.pruners import find_method
from vtp.export.verify import parity
from vtp.export.verify.reference import ReferenceAnswer, reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import StageRunner

from ...models import tiny
from ...models.tiny import IMAGE, pixels, prompt_ids

STEPS = 64
N = 16
UNPRUNED = ["none", "mha", "qwen2", "mistral"]
PRUNED = [
    ("vispruner", 3),
    ("vispruner", 6),
    ("original", 3),
    ("original", 6),
    ("adaptprune", 4),
    ("adaptprune", 7),
    ("fastv", 5),
    ("tied", 16),
    ("siglip", 5),
]


@cache
def load_model(folder: Path) -> LlavaForConditionalGeneration:
    """The model as transformers loads it, never touched by the exporter."""
    return LlavaForConditionalGeneration.from_pretrained(folder).eval()


@dataclass
class Run:
    """A greedy run of a bundle: tokens, every step's logits float32 [V], kept indices, cache lengths."""

    tokens: list[int]
    logits: list[np.ndarray]
    kept: list[int]
    lengths: dict[str, int]


def run_bundle(bundle: Bundle, ids: torch.Tensor, seed: int, keep: int, steps: int = STEPS) -> Run:
    """Feed pixels and a prompt to the stages by hand and go on greedily; no EOS ends it."""
    runner = StageRunner(bundle, "ort-cpu", 1)
    engine = runner.any_engine
    dtype = runner.dtype_of("pixel_values")
    values: dict[str, Value] = {"pixel_values": engine.put(pixels(seed=seed).numpy().astype(dtype))}
    runner.run("image", keep, values, Timings())
    row = ids[0].tolist()
    start = row.index(IMAGE)
    short = [*row[:start], IMAGE, *row[start + N :]]
    values["input_ids"] = engine.put(np.array([short], np.int64))
    values["image_start"] = engine.put(np.array([[start]], np.int64))
    runner.run("prefill", keep, values, Timings())
    position = int(values["next_position"].numpy()[0])
    run = Run([], [values["logits"].numpy()[0, 0]], list(range(N)), {})
    if "keep_indices" in values:
        run.kept = values["keep_indices"].numpy()[0].tolist()
    while True:
        run.tokens.append(int(run.logits[-1].argmax()))
        if len(run.tokens) == steps:
            break
        run.logits.append(runner.step(keep, run.tokens[-1], position).copy())
        position += 1
    run.lengths = {file: one.length for file, one in runner.caches.items()}
    runner.close()
    return run


def worst(run: Run, wanted: list[torch.Tensor]) -> float:
    pairs = zip(run.logits, wanted, strict=True)
    return max(float(np.abs(given - tensor.numpy()).max()) for given, tensor in pairs)


# -- generation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNPRUNED)
@pytest.mark.parametrize(("before", "after"), [(0, 1), (3, 9)])
def test_unpruned_equals_transformers_generate(
    exported: Callable[[str], Any], name: str, before: int, after: int
) -> None:
    made = exported(name)
    model, ids = load_model(made.model), prompt_ids(N, before, after, seed=7)
    run = run_bundle(open_bundle(made.folder), ids, seed=7, keep=N, steps=32)
    with torch.no_grad():
        model.generation_config.eos_token_id = None
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels(seed=7),
            max_new_tokens=32,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert run.tokens == answer.sequences[0, ids.shape[1] :].tolist()
    assert len(set(run.tokens)) > 3  # it says something
    assert worst(run, [row[0].float() for row in answer.logits]) <= 1e-3
    assert run.lengths == {"decoder.onnx": ids.shape[1] + 31}


@pytest.mark.parametrize("name", UNPRUNED)
def test_pipeline_equals_processor_and_generate(
    exported: Callable[[str], Any], picture: Image.Image, name: str
) -> None:
    """From a picture and words to token ids, both ways round, end tokens included."""
    made = exported(name)
    processor = AutoProcessor.from_pretrained(made.model)
    model = LlavaForConditionalGeneration.from_pretrained(made.model).eval()
    with Pipeline.load(made.folder, threads=1) as pipe:
        for question in ("what shape is the red ?", "how many circle ?", "naïve café 你好 🙂"):
            turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = processor.apply_chat_template(turns, add_generation_prompt=True)
            inputs = processor(images=picture, text=text, return_tensors="pt", add_special_tokens=False)
            with torch.no_grad():
                answer = model.generate(**inputs, max_new_tokens=24, do_sample=False)
            wanted = answer[0, inputs["input_ids"].shape[1] :].tolist()
            result = pipe.generate(picture, question, max_new_tokens=24)
            assert result.token_ids == wanted
            assert result.raw_text == processor.tokenizer.decode(wanted, skip_special_tokens=True)
            assert result.prompt_tokens == inputs["input_ids"].shape[1] - N


def reference(made: Any, ids: torch.Tensor, seed: int, keep: int) -> ReferenceAnswer:
    method = open_bundle(made.folder).manifest.method
    pruner = find_method(method.name)((4, 4), keep, **method.options)
    return reference_generate(
        load_model(made.model),
        pruner,
        ids,
        pixels(seed=seed),
        max_new_tokens=STEPS + 1,
        positions=method.positions,
    )


@pytest.mark.parametrize(("name", "keep"), PRUNED)
def test_pruned_equals_the_reference_for_64_steps(
    exported: Callable[[str], Any], name: str, keep: int
) -> None:
    made = exported(name)
    bundle, ids = open_bundle(made.folder), prompt_ids(N, 3, 8, seed=11)
    answer = reference(made, ids, 11, keep)
    run = run_bundle(bundle, ids, seed=11, keep=keep, steps=STEPS + 1)
    assert run.kept == answer.keep_indices.flatten().tolist()
    assert run.tokens == answer.token_ids and len(run.tokens) == STEPS + 1
    assert worst(run, answer.step_logits) <= 1e-3
    found = [0] * len(answer.cache_lengths)
    for file, length in run.lengths.items():
        kv = bundle.manifest.graphs[file].kv
        assert kv is not None
        for layer in kv.layers:
            found[layer] = length
    assert found == answer.cache_lengths


@pytest.mark.parametrize("name", ["adaptprune", "fastv"])
def test_a_cut_inside_the_decoder_has_two_lengths(exported: Callable[[str], Any], name: str) -> None:
    bundle, ids = open_bundle(exported(name).folder), prompt_ids(N, 3, 8)
    keep = bundle.manifest.visual.keep[0]
    lengths = run_bundle(bundle, ids, seed=0, keep=keep, steps=STEPS + 1).lengths
    whole = ids.shape[1] + STEPS
    assert lengths == {"decoder_head.onnx": whole, "decoder.onnx": whole - N + keep}


def test_positions_differ_and_matter(exported: Callable[[str], Any]) -> None:
    ids = prompt_ids(N, 3, 8)
    runs = [run_bundle(open_bundle(exported(name).folder), ids, 0, 3) for name in ("vispruner", "original")]
    assert runs[0].kept == runs[1].kept
    assert runs[0].tokens != runs[1].tokens


def test_float16_stays_near(exported: Callable[[str], Any]) -> None:
    made = exported("float16")
    ids = prompt_ids(N, 3, 8, seed=5)
    model = LlavaForConditionalGeneration.from_pretrained(made.model, dtype=torch.float16).float().eval()
    run = run_bundle(open_bundle(made.folder), ids, seed=5, keep=6, steps=16)
    pruner = parity.Chosen(find_method("vispruner")((4, 4), 6), torch.tensor([run.kept]))
    answer = reference_generate(model, pruner, ids, pixels(seed=5), max_new_tokens=16)
    for given, wanted in zip(run.logits, answer.step_logits, strict=True):
        scale = float(wanted.abs().max())
        assert float(np.abs(given - wanted.numpy()).max()) <= 2e-2 * scale
        top = wanted.topk(2).values
        if int(given.argmax()) != int(wanted.argmax()):
            assert float(top[0] - top[1]) <= 2e-2 * scale
            break


# -- the graphs by hand: batches -----------------------------------------------------------------------------


def decoder_caches(bundle: Bundle, file: str, batch: int) -> dict[str, np.ndarray]:
    kv = bundle.manifest.graphs[file].kv
    assert kv is not None
    shape = (batch, kv.heads, kv.capacity, kv.head_dim)
    return {f"{layer}.{part}": np.zeros(shape, kv.dtype) for layer in kv.layers for part in ("key", "value")}


def run_decoder(bundle: Bundle, embeds: list[np.ndarray], lengths: list[int], steps: int) -> np.ndarray:
    """Right-padded prefill of a batch, then greedy steps; logits [steps + 1, B, V]."""
    engine = open_graph(bundle.path("decoder.onnx"), "ort-cpu", 1)
    embed = open_graph(bundle.path("embed_tokens.onnx"), "ort-cpu", 1)
    batch, longest = len(embeds), max(lengths)
    hidden = np.zeros((batch, longest, embeds[0].shape[-1]), np.float32)
    for row, (rows, length) in enumerate(zip(embeds, lengths, strict=True)):
        hidden[row, :length] = rows[:length]
        hidden[row, length:] = 9.0  # padding that would show
    buffers = {
        name: engine.put(array) for name, array in decoder_caches(bundle, "decoder.onnx", batch).items()
    }
    past = {f"past_key_values.{name}": value for name, value in buffers.items()}
    into = {f"present.{name}": value for name, value in buffers.items()}
    filled = np.array(lengths)
    positions = np.tile(np.arange(longest), (batch, 1))
    found = []
    for step in range(steps + 1):
        feeds = {
            "inputs_embeds": engine.put(hidden),
            "position_ids": engine.put(positions.astype(np.int64)),
            "seqlens_k": engine.put((filled - 1).astype(np.int32)),
            "total_sequence_length": engine.put(np.array(filled.max(), np.int32)),
        }
        logits = engine.run({**feeds, **past}, into)["logits"].numpy()[:, 0]
        found.append(logits)
        ids = logits.argmax(axis=1)[:, None].astype(np.int64)
        hidden = embed.run({"input_ids": embed.put(ids)})["inputs_embeds"].numpy()
        positions = filled[:, None]
        filled = filled + 1
        assert step <= steps
    return np.stack(found)


@pytest.mark.parametrize("name", ["none", "mha", "qwen2"])
def test_a_padded_batch_equals_single_rows(exported: Callable[[str], Any], name: str) -> None:
    bundle = open_bundle(exported(name).folder)
    width = bundle.manifest.model.hidden_size
    rng = np.random.default_rng(3)
    embeds = [rng.normal(size=(12, width)).astype(np.float32) for _ in range(2)]
    together = run_decoder(bundle, embeds, [12, 7], steps=8)
    for row, length in enumerate((12, 7)):
        alone = run_decoder(bundle, [embeds[row]], [length], steps=8)
        np.testing.assert_allclose(together[:, row], alone[:, 0], atol=1e-4)


@pytest.mark.parametrize("name", ["vispruner", "original", "siglip"])
def test_image_graphs_take_batches(exported: Callable[[str], Any], name: str) -> None:
    """vision_encoder, pruner, projector and splice: rows of a batch do not see each other."""
    bundle = open_bundle(exported(name).folder)
    keep = bundle.manifest.visual.keep[0]
    images = np.concatenate([pixels(seed=seed).numpy() for seed in (1, 2, 3)])
    ids = np.stack([np.roll(np.arange(10, 19), seed) for seed in range(3)]).astype(np.int64)
    starts = np.array([[0], [4], [8]], np.int64)
    names = ("vision_encoder", "pruner", "projector", "embed_tokens", "splice")

    def flow(rows: slice) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {
            "pixel_values": images[rows],
            "input_ids": ids[rows],
            "image_start": starts[rows],
        }
        for when in ("image", "prefill"):
            for stage in bundle.manifest.stages_for(when, keep):
                if stage.name in names:
                    engine = open_graph(bundle.path(stage.file), "ort-cpu", 1)
                    feeds = {name: engine.put(found[source]) for name, source in stage.inputs.items()}
                    outputs = engine.run(feeds)
                    found |= {target: outputs[name].numpy() for name, target in stage.outputs.items()}
        return found

    together = flow(slice(0, 3))
    for row in range(3):
        for key, value in flow(slice(row, row + 1)).items():
            np.testing.assert_allclose(together[key][row : row + 1], value, atol=1e-4, err_msg=key)


# -- the exporter's own check --------------------------------------------------------------------------------


def test_the_check_at_export_reports_what_it_found(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = str(model_folder("tied"))
    bundle = export(Request(tmp_path / "out", model=model, method="adaptprune", keep_tokens="3,5"))
    report = bundle.manifest.parity
    assert report["mode"] == "full"
    assert set(report["generation"]) == {"3", "5"}
    assert all(case["equal"] == case["tokens"] == parity.STEPS for case in report["generation"].values())
    assert all(
        case["relative"] <= 1e-5 and case["cosine"] > 0.99999 for case in report["generation"].values()
    )
    assert report["graphs"]["vision_encoder"]["rows"] > 0 and report["graphs"]["projector"]["relative"] < 1e-5
    assert report["graphs"]["pruner_3"]["indices"] == report["graphs"]["pruner_5"]["indices"] == "equal"


def test_a_bundle_that_differs_from_torch_is_not_written(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Change the graphs' weights behind the exporter's back: the check must fail and nothing may stay."""
    real = parity.verify

    def spoil(bundle: Bundle, *rest: Any) -> Any:
        path = bundle.path("decoder.onnx.data")
        whole = np.fromfile(path, np.float32)
        (whole * np.float32(1.05)).tofile(path)
        with pytest.raises(VtpError, match="fidelity check failed"):
            real(bundle, *rest)
        np.where(np.arange(len(whole)) < 1024, whole, np.float32("nan")).tofile(path)
        return real(bundle, *rest)

    monkeypatch.setattr("vtp.export.exporter.verify", spoil)
    request = Request(tmp_path / "out", model=str(model_folder("mha")), method="none")
    with pytest.raises(VtpError, match="fidelity check failed"):
        export(request)
    assert list(tmp_path.iterdir()) == []


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"decoder": "qwen3", "layers": 3}, "adaptprune"),
        ({"rope_parameters": YARN, "layers": 2}, "none"),
        ({"decoder": "mistral", "sliding_window": 64, "layers": 2}, "none"),
    ],
)
def test_rarer_decoders_pass_the_check_at_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], method: str
) -> None:
    """Norms on queries and keys, scaled rotary embeddings, a sliding window (which bounds the length)."""
    monkeypatch.setitem(tiny.DECODERS, "qwen3", (Qwen3Config, {}))
    tiny.save_tiny(tmp_path / "model", vision_layers=2, **options)
    manifest = export(Request(tmp_path / "out", model=str(tmp_path / "model"), method=method)).manifest
    assert all(case["equal"] == case["tokens"] for case in manifest.parity["generation"].values())
    assert manifest.model.max_length == options.get("sliding_window", 1024)
