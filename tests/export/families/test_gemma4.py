"""Gemma 4: layers that share keys and values, inputs per layer, budgets; bundles against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vtp.engines import UsageError, VtpError
from vtp.export.checkpoint.loading import load
from vtp.export.checkpoint.unsupported import refuse_unsupported
from vtp.export.exporter import Request, export
from vtp.export.families.gemma.gemma4 import Gemma4
from vtp.export.verify.parity import STEPS
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.bundle.memory import cache_bytes
from vtp.runtime.preprocess import preprocess, spec_to_json

from ...models.tiny_gemma4 import processed, save_gemma4
from ...once import Once
from ...oracles.several_pictures import TALK, asked, by_transformers, check_answers, check_batch, noises
from ...oracles.tensorrt_10_3 import refused
from ..pruners.test_trtrtx import ENGINE, MISSING
from .compared import (
    Made,
    bundles_of,
    check_builds,
    check_choice,
    check_openvino,
    check_text_alone,
    follow,
    marked,
)

COUNT, SIZE, WORDS = 64, (96, 96), "what shape is it ?"
MASKS = {"oldest_onnxruntime": "1.30"}  # attention takes masks
HALF, TENSORRT, JETPACK = {"dtype": "float16"}, {"target": "tensorrt"}, {"target": "jetpack6"}
# Name: model, method, keep-counts, fields of the export's Request.
BUNDLES: dict[str, tuple[str, str, str | None, dict[str, Any]]] = {
    "short-vispruner": ("short", "vispruner", "20,64", {}),
    "small-fastv": ("small", "fastv", "20,64", {}),
    "small-none": ("small", "none", None, {}),
    "small-vispruner": ("small", "vispruner", "9,20", {}),
    "small-original": ("small", "divprune", "20", {"method_options": ["positions=original"]}),
    "small-visionzip": ("small", "visionzip", "20", {}),
    "small-layers": ("small", "fastv", "20", {"verify": "layers"}),
    "small-half": ("small", "vispruner", "20", HALF),
    "small-tensorrt": ("small", "fastv", "20", TENSORRT),
    "small-jetpack6": ("small", "fastv", "20", JETPACK),
    "large-none": ("large", "none", None, {}),
    "large-vispruner": ("large", "vispruner", "20", {}),
    "large-adaptprune": ("large", "adaptprune", "20", {"image_size": (84, 108)}),
    "large-sparsevlm": ("large", "sparsevlm", "20", {}),
    "large-fastv": ("large", "fastv", "20", {}),
    "small-masks": ("small", "none", None, MASKS),
    "large-masks": ("large", "vispruner", "20,64", MASKS),
    "large-tensorrt": ("large", "fastv", "20", TENSORRT),
}
QUICK = {"short-vispruner"}  # with all tokens as well
NAMES = marked(BUNDLES, QUICK)
SOME = [NAMES[name] for name, (*_, wishes) in BUNDLES.items() if wishes not in (HALF, TENSORRT, JETPACK)]


@pytest.fixture(scope="module")
def bundle(once: Once, saved: Callable[..., Any]) -> Callable[[str], Made]:
    """A bundle by name, exported and held against torch at the first call."""
    table = {
        name: (kind, {"method": method, "keep_tokens": keep, **wishes})
        for name, (kind, method, keep, wishes) in BUNDLES.items()
    }
    return bundles_of(table, once, lambda kind: saved(save_gemma4, kind), max_length=384)


# -- generation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [NAMES[name] for name in ("small-fastv", "small-none", "large-none", "small-masks", "large-masks")],
)
def test_with_all_tokens_it_equals_transformers(bundle: Callable[[str], Made], name: str) -> None:
    """From the picture and the words on: greedy tokens and their logits, past the window of 40."""
    made, turns = bundle(name), asked(WORDS, 1)
    picture = noises(1, 70, 66)[0]
    given = processed([picture], turns)
    tokens, logits = by_transformers(made.model, given)
    opened = open_bundle(made.folder)
    pixels = preprocess(picture, opened.manifest.image)
    count = int(given["pixel_values"].shape[1])
    assert np.array_equal(pixels, given["pixel_values"][0, : len(pixels)].numpy()) and len(pixels) <= count

    with Pipeline.load(made.folder, threads=1) as pipe:
        pipe.manifest.text.__dict__["eos_token_ids"] = ()
        prompt = pipe._prompter.encode(turns, 1)
        place, image = prompt.image_start, opened.manifest.text.image_token_id
        wide = [*prompt.ids[:place], *[image] * COUNT, *prompt.ids[place + 1 :]]
        assert wide == given["input_ids"][0].tolist()
        result = pipe.generate(picture, WORDS, max_new_tokens=len(tokens), keep_tokens=COUNT)
        assert result.token_ids == tokens
    assert follow(made.folder, pixels, prompt.ids, place, logits)[0] == tokens


@pytest.mark.parametrize("name", SOME)
def test_pruned_equals_the_torch_reference(bundle: Callable[[str], Made], name: str) -> None:
    """Which tokens are kept, by a pruner and cues of the reference's own making, and what is said then."""
    made, (_, method, _, wishes) = bundle(name), BUNDLES[name]
    report = open_bundle(made.folder).manifest.parity["generation"]
    steps = 2 if wishes.get("verify") == "layers" else STEPS
    assert report and all(one["tokens"] == one["equal"] == steps for one in report.values())
    if method not in ("none", "sparsevlm"):  # whose sites the export has already held against torch
        check_choice(made, WORDS, wide_ids)


def wide_ids(picture: Any, pipe: Pipeline) -> torch.Tensor:
    """The prompt [1,S] with a placeholder for every visual token."""
    prompt, image = pipe._prompter.encode(asked(WORDS, 1), 1), pipe.manifest.text.image_token_id
    places = [image] * pipe.manifest.visual.count
    return torch.tensor([[*prompt.ids[: prompt.image_start], *places, *prompt.ids[prompt.image_start + 1 :]]])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small-half", "small-tensorrt", "small-jetpack6", "large-tensorrt"])
def test_other_precisions_and_targets_answer(bundle: Callable[[str], Made], name: str) -> None:
    """The export held them against torch on ONNX Runtime; here is what it found, and TensorRT 10.3's list."""
    opened = open_bundle(bundle(name).folder)
    report = opened.manifest.parity["generation"]
    assert report and all(one["tokens"] == STEPS for one in report.values())
    if name.endswith("jetpack6"):
        assert [line for file in opened.manifest.graphs for line in refused(opened.path(file))] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small-vispruner", "small-none", "large-vispruner", "large-none"])
def test_several_pictures_and_a_conversation(bundle: Callable[[str], Made], name: str) -> None:
    made = bundle(name)
    check_answers(made.folder, made.model, _unpadded, SIZE, [asked(WORDS, 2), TALK])
    check_batch(made.folder, SIZE)


def _unpadded(pictures: list[Any], turns: list[dict[str, Any]]) -> dict[str, Any]:
    """As `processed`, without the patches that fill pictures up to the budget."""
    given = processed(pictures, turns)
    real = (given["image_position_ids"][0] >= 0).all(dim=-1)
    return {**given, **{name: given[name][:, real] for name in ("pixel_values", "image_position_ids")}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small-fastv", "large-fastv"])
def test_text_alone(bundle: Callable[[str], Made], name: str) -> None:
    check_text_alone(bundle(name))


@pytest.mark.slow
def test_openvino_answers_the_same(bundle: Callable[[str], Made]) -> None:
    for name in ("small-fastv", "large-vispruner"):
        check_openvino(bundle(name).folder, SIZE, WORDS, 20)


def test_caches_of_unequal_layers(bundle: Callable[[str], Made]) -> None:
    """Layers of both kinds have their own head size, those that share have no cache, and all is counted."""
    graphs = open_bundle(bundle("short-vispruner").folder).manifest.graphs
    decoder = graphs["decoder.onnx"]
    assert decoder.kv is not None and decoder.kv.layers == [0, 1]
    shapes = {name: info.shape[1::2] for name, info in decoder.inputs.items() if name.startswith("past")}
    assert shapes["past_key_values.0.key"] == [2, 16] and shapes["past_key_values.1.value"] == [2, 32]
    assert cache_bytes(decoder) == 2 * 2 * (16 + 32) * decoder.kv.capacity * 4


@pytest.mark.slow
@pytest.mark.trtrtx
@pytest.mark.skipif(MISSING, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("name", ["small-tensorrt", "large-tensorrt"])
def test_every_graph_builds_with_tensorrt_rtx(bundle: Callable[[str], Made], name: str) -> None:
    check_builds(bundle(name).folder, ENGINE)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vision_config": None}, "no vision tower"),
        (
            {"text_config": {"model_type": "gemma3_text"}},
            "decoder is 'gemma3_text'; supported .* gemma4_text",
        ),
        ({"text_config": {"enable_moe_block": True}}, "has experts"),
        ({"text_config": {"use_bidirectional_attention": "all"}}, "is 'all'; supported: null and 'vision'"),
        ({"vision_config": {"num_key_value_heads": 1}}, "num_key_value_heads is not"),
    ],
)
def test_a_config_that_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(VtpError, match=message):
        Gemma4.check({"text_config": {}, "vision_config": {}, **config})


@pytest.mark.parametrize("own", [{"1": {"hidden_size": 3}}, {"1": 3}, []])
def test_layers_of_another_kind_are_refused(tmp_path: Path, own: Any) -> None:
    """What transformers writes of single layers, their heads and head size, and nothing else."""
    text = {
        "model_type": "gemma4_text",
        "per_layer_config": {"1": {"head_dim": 32, "num_key_value_heads": 1}},
    }
    refuse_unsupported(tmp_path, {"text_config": text})
    with pytest.raises(VtpError, match=r"sets text_config\.per_layer_config"):
        refuse_unsupported(tmp_path, {"text_config": {**text, "per_layer_config": own}})


def test_what_cannot_be_asked_for(saved: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = saved(save_gemma4, "small")
    with pytest.raises(UsageError, match="whole tokens; give multiples of 12"):
        load(folder, "float32", (90, 96))
    with pytest.raises(UsageError, match="9 tokens of 12x12, and no picture is given as many"):
        load(folder, "float32", (36, 36))
    asked = Request(tmp_path / "out", str(folder), "pyramiddrop", "20", verify="none")
    with pytest.raises(UsageError, match=r"prunes before decoder layer \d, .* keys and values of layer 2"):
        export(asked)


@pytest.mark.parametrize(("size", "budget"), [((96, 96), 70), ((132, 132), 140), ((192, 192), 280)])
def test_an_image_size_names_its_budget(saved: Callable[..., Any], size: Any, budget: int) -> None:
    folder, _ = saved(save_gemma4, "small")
    made = load(folder, "float32", size)
    assert spec_to_json(made.image)["max_soft_tokens"] == budget
    assert made.family.grid == (size[0] // 12, size[1] // 12)
