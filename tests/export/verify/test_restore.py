"""--restore: log(N/K) on the attention logits of kept visual keys, held against transformers with a mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from vtp.engines import UsageError
from vtp.engines.tensorrt.library import INSTALL, build_engine, refused_nodes
from vtp.export.layouts.transformers_js import served
from vtp.export.pruners import find_method
from vtp.export.request import Request, _served_restore
from vtp.export.verify.parity import Chosen
from vtp.export.verify.reference import reference_generate
from vtp.runtime import NO_PICTURE, Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands.build import profile_of
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import Row, StageRunner

from ...models.tiny import IMAGE, pixels, prompt_ids
from ...models.tiny_gemma import save_gemma, tiny_gemma3
from ...models.tiny_qwen import save_qwen
from ...models.tiny_split import save_idefics3
from ...oracles.tensorrt_10_3 import refused
from ..pruners.test_trtrtx import ENGINE, MISSING

N, K = 16, 6


@pytest.fixture(scope="module")
def restored(once: Any, model_folder: Callable[[str], Path]) -> Path:
    """A bundle that keeps 6 or all of 16 tokens, verified."""
    wishes = {"method": "fastervlm", "keep_tokens": f"{K},{N}", "max_length": 128, "restore": True}
    return once.bundle(model_folder("gqa"), **wishes)


def save_qwen3(path: Path) -> Any:
    return save_qwen(path, "qwen3_vl", seed=4, layers=4, depth=4)


def prefill(
    folder: Path, keep: int, engine: str = "ort-cpu"
) -> tuple[StageRunner, dict[str, Any], list[int]]:
    """A runner that has read a prompt, what flowed, and the prompt's ids with one id for the picture."""
    runner = StageRunner(open_bundle(folder), engine, 1)
    row = prompt_ids(N)[0].tolist()
    start = row.index(IMAGE)
    short = [*row[:start], IMAGE, *row[start + N :]]
    return runner, runner.prefill(keep, pixels(seed=1).numpy(), short, start, Timings()), short


def test_logits_are_those_of_transformers_with_an_additive_mask(restored, model_folder, cpu_engine) -> None:
    """Prompt and steps: transformers reads everything anew each time, through a four-dimensional mask."""
    model = LlavaForConditionalGeneration.from_pretrained(model_folder("gqa"), attn_implementation="eager")
    runner, values, short = prefill(restored, K, cpu_engine)
    kept, start = values["keep_indices"].numpy()[0], short.index(IMAGE)
    with torch.no_grad():
        features = model.get_image_features(pixels(seed=1), return_dict=True).pooler_output[0][kept]
        words = model.get_input_embeddings()(torch.tensor(short))
        embeds = torch.cat([words[:start], features, words[start + 1 :]])
        logits, position = values["logits"].numpy()[0, 0], int(values["next_position"].numpy()[0])
        for _ in range(4):
            size = len(embeds)
            mask = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)
            mask[:, start : start + K] += math.log(N / K)
            hidden = model.model.language_model(
                inputs_embeds=embeds[None], attention_mask=mask[None, None], use_cache=False
            ).last_hidden_state
            wanted = model.lm_head(hidden[0, -1])
            np.testing.assert_allclose(logits, wanted.numpy(), atol=3e-4)
            token = int(wanted.argmax())
            embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([token]))])
            logits, position = runner.step(K, token, position).copy(), position + 1
    runner.close()


def test_nothing_changes_where_all_tokens_are_kept(restored, exported) -> None:
    found = []
    for folder in (restored, exported("none").folder):
        runner, values, _ = prefill(folder, N)
        position = int(values["next_position"].numpy()[0])
        found.append([values["logits"].numpy()[0, 0].copy(), runner.step(N, 7, position).copy()])
        runner.close()
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_the_answer_differs_from_one_without_it_and_the_manifest_says_why(restored, model_folder) -> None:
    manifest = open_bundle(restored).manifest
    assert manifest.method.restore and manifest.parity["generation"][str(K)]["equal"] == 16
    (cache,) = [graph.kv for graph in manifest.graphs.values() if graph.kv]
    model = LlavaForConditionalGeneration.from_pretrained(model_folder("gqa")).eval()
    assert cache.head_dim == model.config.text_config.head_dim + 8
    runner, values, _ = prefill(restored, K)
    kept = torch.from_numpy(values["keep_indices"].numpy())
    pruner = Chosen(find_method("fastervlm")((4, 4), K), kept)
    plain, biased = (
        reference_generate(model, pruner, prompt_ids(N), pixels(seed=1), 1, restore=flag).first_logits.numpy()
        for flag in (False, True)
    )
    runner.close()
    np.testing.assert_allclose(values["logits"].numpy()[0, 0], biased, atol=3e-4)
    assert np.abs(plain - biased).max() > 1e-2


def test_two_pictures_of_a_prompt_gain_alike(restored, model_folder) -> None:
    """Each keeps 6 of 16: every one of the 12 stands for 32 / 12."""
    looks, rows = [pixels(seed=1), pixels(seed=2)], [[5], [6, 7], [8, 9, 10]]
    short = [*rows[0], IMAGE, *rows[1], IMAGE, *rows[2]]
    whole = [*rows[0], *[IMAGE] * N, *rows[1], *[IMAGE] * N, *rows[2]]
    runner = StageRunner(open_bundle(restored), "ort-cpu", 1)
    given = [one.numpy() for one in looks]
    values = runner.prefill_rows(K, given, [Row(short, [1, 4])], Timings())
    model = LlavaForConditionalGeneration.from_pretrained(model_folder("gqa")).eval()
    pruner = find_method("fastervlm")((4, 4), K)
    answer = reference_generate(model, pruner, torch.tensor([whole]), looks, 2, restore=True)
    found = [values["logits"].numpy()[0, 0].copy()]
    found.append(runner.step(K, answer.token_ids[0], int(values["next_position"].numpy()[0])).copy())
    for ours, theirs in zip(found, answer.step_logits, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=3e-4)
    runner.close()


def test_batches_conversations_and_text_alone(restored, exported, picture: Image.Image) -> None:
    questions = ["what ?", "how many circle is the red star in this picture ?"]
    pictures = [picture, picture.rotate(90)]
    with Pipeline.load(restored, "ort-cpu", 1, prefix_caching=True) as pipe:
        alone = [
            pipe.generate(*pair, keep_tokens=K, max_new_tokens=8)
            for pair in zip(pictures, questions, strict=True)
        ]
        again = pipe.generate(pictures[1], questions[1], keep_tokens=K, max_new_tokens=8)
        assert again.token_ids == alone[1].token_ids and again.timings.reused_tokens > K
        words = pipe.generate(NO_PICTURE, "what ?", max_new_tokens=8).token_ids
    with Pipeline.load(restored, "ort-cpu", 1) as pipe:
        together = pipe.generate_batch(pictures, questions, keep_tokens=K, max_new_tokens=8)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert alone[0].to_json()["restore"] is True
    with Pipeline.load(exported("none").folder, "ort-cpu", 1) as pipe:
        assert pipe.generate(NO_PICTURE, "what ?", max_new_tokens=8).token_ids == words
        assert pipe.generate(picture, "what ?", max_new_tokens=1).to_json().get("restore") is None


@pytest.mark.parametrize(
    ("model", "wishes"),
    [
        pytest.param("gqa", {"method": "fastv", "keep_tokens": "5"}, marks=pytest.mark.slow),
        pytest.param("four", {"method": "pyramiddrop", "keep_tokens": "4"}, marks=pytest.mark.slow),
        pytest.param("four", {"method": "sparsevlm", "keep_tokens": "4,7"}, marks=pytest.mark.slow),
        pytest.param("gqa", {"method": "vispruner", "dtype": "float16"}, marks=pytest.mark.slow),
        pytest.param("mha", {"method": "cdpruner", "target": "tensorrt"}, marks=pytest.mark.slow),
        pytest.param("gqa", {"method": "fastv", "target": "jetpack6"}, marks=pytest.mark.slow),
        pytest.param("gqa", {"method": "vispruner", "verify": "layers"}, marks=pytest.mark.slow),
    ],
)
def test_bundles_are_verified_against_torch(once, model_folder, model, wishes) -> None:
    """Sites in the decoder, one after the other; targets; half precision: all hold their torch reference."""
    folder = once.bundle(model_folder(model), max_length=128, restore=True, **wishes)
    for case in open_bundle(folder).manifest.parity["generation"].values():
        assert case["equal"] == case["tokens"] > 1


@pytest.mark.slow
def test_jetpack6_writes_what_tensorrt_10_3_takes(once, model_folder) -> None:
    wishes = {"max_length": 128, "restore": True, "method": "fastv", "target": "jetpack6"}
    paths = list(once.bundle(model_folder("gqa"), **wishes).glob("*.onnx"))
    assert len(paths) == 7 and [line for path in paths for line in refused(path)] == []


@pytest.mark.slow
@pytest.mark.trtrtx
@pytest.mark.skipif(MISSING, reason=f"tensorrt_rtx is not installed: {INSTALL[ENGINE]}")
def test_every_graph_builds_with_tensorrt(once, model_folder) -> None:
    """Heads of 8 columns are 16 wide with the bias: what the fused Attention takes."""
    wishes = {"max_length": 128, "restore": True, "method": "fastv", "target": "tensorrt"}
    opened = open_bundle(once.bundle(model_folder("gqa"), **wishes))
    for file, graph in opened.manifest.graphs.items():
        assert refused_nodes(opened.path(file), ENGINE) == []
        assert build_engine(opened.path(file), ENGINE, profile_of(graph)).plan.nbytes, file
    nodes = onnx.load(opened.path("decoder.onnx"), load_external_data=False).graph.node
    assert "Attention" in {node.op_type for node in nodes}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save", "kind", "wishes"),
    [
        (save_idefics3, (), {"method": "fastv", "keep_tokens": "5", "image_size": (28, 56)}),
        (save_idefics3, (), {"method": "vispruner", "keep_tokens": "5", "image_size": (28, 56)}),
        (save_qwen3, (), {"method": "vispruner", "keep_tokens": "5", "image_size": (32, 48)}),
        (save_gemma, (tiny_gemma3,), {"method": "vispruner", "keep_tokens": "5"}),
        (save_gemma, (tiny_gemma3,), {"method": "fastv", "keep_tokens": "5"}),
    ],
)
def test_families_are_verified_against_torch(tmp_path, save, kind, wishes) -> None:
    """Marks between tiles, positions along axes, features added in the decoder, masks that look ahead."""
    from vtp.export.exporter import export

    save(tmp_path / "model", *(one() if callable(one) else one for one in kind))
    bundle = export(Request(tmp_path / "bundle", model=str(tmp_path / "model"), restore=True, **wishes))
    for case in bundle.manifest.parity["generation"].values():
        assert case["equal"] == case["tokens"] > 1


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("none", "--restore goes with a method that drops tokens; method none keeps all of them"),
        ("prumerge", "method prumerge merges them into the kept ones"),
    ],
)
def test_methods_that_it_does_not_go_with(tmp_path, method, problem) -> None:
    with pytest.raises(UsageError, match=problem):
        Request(tmp_path / "b", method=method, restore=True).check()
    assert not (tmp_path / "b").exists()


def test_logits_that_are_bent_and_other_layouts_are_refused(tmp_path) -> None:
    config = SimpleNamespace(attn_logit_softcapping=50.0, model_type="gemma2")
    decoder = SimpleNamespace(model=SimpleNamespace(config=config))
    checkpoint: Any = SimpleNamespace(family=SimpleNamespace(decoder=decoder))
    with pytest.raises(UsageError, match=r"\(gemma2\) bends them to within 50 afterwards"):
        _served_restore(Request(tmp_path, restore=True), checkpoint)
    assert _served_restore(Request(tmp_path), checkpoint) is False
    with pytest.raises(UsageError, match=r"layout transformers\.js has no place for --restore"):
        served._check_restore(True)
