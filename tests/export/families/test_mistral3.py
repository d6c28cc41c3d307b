"""Mistral 3 and Pixtral: rows of tokens with marks between them, queries scaled by position."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.engines import UsageError, VtpError
from vtp.export.checkpoint.loading import load
from vtp.export.families import find_family
from vtp.export.families.llava.llava import Llava
from vtp.export.families.pixtral.mistral3 import Mistral3
from vtp.export.families.pixtral.pixtral import Pixtral
from vtp.export.verify.parity import STEPS
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter

from ...models.tiny_pixtral import BREAK, IMAGE, STOP, processed, save_mistral3
from ...once import Once
from ...oracles.several_pictures import (
    TALK,
    asked,
    by_transformers,
    check_answers,
    check_batch,
    logits_of,
    noises,
)
from ...oracles.tensorrt_10_3 import refused
from ..pruners.test_trtrtx import ENGINE, MISSING
from .compared import Made, bundles_of, check_builds, check_choice, check_openvino, check_text_alone, marked

SIZE, GRID, WORDS = (32, 40), (4, 5), "what shape is it ?"
HALF, TENSORRT, JETPACK = {"dtype": "float16"}, {"target": "tensorrt"}, {"target": "jetpack6"}
SMALL = {"image_size": (16, 20)}  # of Pixtral, whose tokens are half as wide
# Name: kind of model, method, keep-counts, fields of the export's Request.
BUNDLES: dict[str, tuple[str, str, str | None, dict[str, Any]]] = {
    "ministral3-vispruner": ("ministral3", "vispruner", "6,20", {}),
    "ministral3-none": ("ministral3", "none", None, {}),
    "ministral3-fastv": ("ministral3", "fastv", "6", {}),
    "ministral3-pyramiddrop": ("ministral3", "pyramiddrop", "6", {}),
    "ministral3-original": ("ministral3", "divprune", "6", {"method_options": ["positions=original"]}),
    "ministral3-layers": ("ministral3", "fastv", "6", {"verify": "layers"}),
    "ministral3-half": ("ministral3", "vispruner", "6", HALF),
    "ministral3-tensorrt": ("ministral3", "adaptprune", "6", TENSORRT),
    "ministral3-jetpack6": ("ministral3", "adaptprune", "6", JETPACK),
    "mistral-none": ("mistral", "none", None, {}),
    "mistral-fastv": ("mistral", "fastv", "6,20", {}),
    "mistral-visionzip": ("mistral", "visionzip", "6", {}),
    "mistral-cdpruner": ("mistral", "cdpruner", "6", {}),
    "mistral-row": ("mistral", "vispruner", "3", {"image_size": (8, 40)}),
    "mistral-tensorrt": ("mistral", "vispruner", "6", TENSORRT),
    "pixtral-vispruner": ("pixtral", "vispruner", "6,20", SMALL),
    "pixtral-fastv": ("pixtral", "fastv", "6,20", SMALL),
    "pixtral-visionzip": ("pixtral", "visionzip", "6", SMALL),
}
QUICK = {"ministral3-vispruner"}  # with all tokens as well
NAMES = marked(BUNDLES, QUICK)
SOME = [NAMES[name] for name, (*_, wishes) in BUNDLES.items() if wishes not in (HALF, TENSORRT, JETPACK)]


@pytest.fixture(scope="module")
def bundle(once: Once, saved: Callable[..., Any]) -> Callable[[str], Made]:
    """A bundle by name, exported and held against torch at the first call."""
    table = {
        name: (decoder, {"method": method, "keep_tokens": keep, **wishes})
        for name, (decoder, method, keep, wishes) in BUNDLES.items()
    }

    def get(name: str) -> Made:
        # PyramidDrop prunes before three layers.
        layers = 4 if name.endswith("pyramiddrop") else 2 if name in QUICK else 3
        folders = partial(saved, save_mistral3, layers=layers)
        return bundles_of(table, once, folders, max_length=256, image_size=SIZE)(name)

    return get


def processing(pictures: list[Any], turns: list[dict[str, Any]]) -> dict[str, Any]:
    return processed(pictures, turns, max(SIZE))


def processing_small(pictures: list[Any], turns: list[dict[str, Any]]) -> dict[str, Any]:
    return processed(pictures, turns, max(SMALL["image_size"]), edge=1)


def of(name: str) -> Callable[..., dict[str, Any]]:
    """transformers' processing for a bundle's model and size."""
    return processing_small if name.startswith("pixtral") else processing


# -- generation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [NAMES[name] for name in ("ministral3-vispruner", "mistral-fastv", "pixtral-fastv")]
)
def test_with_all_tokens_it_equals_transformers(bundle: Callable[[str], Made], name: str) -> None:
    """From the picture (which is shrunk) and the words on: prompt, pixels, greedy tokens and their logits."""
    made, turns, picture = bundle(name), asked(WORDS, 1), noises(1, 70, 90)[0]
    given = of(name)([picture], turns)
    tokens, logits = by_transformers(made.model, given)
    with Pipeline.load(made.folder, threads=1) as pipe:
        pipe.manifest.text.__dict__["eos_token_ids"] = ()
        pixels = preprocess(picture, pipe.manifest.image)
        assert np.array_equal(pixels, given["pixel_values"].numpy())
        result = pipe.generate(picture, WORDS, max_new_tokens=len(tokens), keep_tokens=20)
        assert result.token_ids == tokens
        found = logits_of(pipe, [pixels], turns, 20, tokens)
    for ours, theirs in zip(found, logits, strict=True):
        assert np.abs(ours - theirs.numpy()).max() < 1e-3


def test_marks_stay_in_the_prompt(bundle: Callable[[str], Made]) -> None:
    """What the prompter gives the graphs, against transformers' prompt with every row's tokens."""
    opened = open_bundle(bundle("ministral3-vispruner").folder)
    prompter = Prompter(opened.manifest.text, opened.path("tokenizer.json"))
    ids = prompter.encode(prompter.messages_for(WORDS)).ids
    wide = [one for number in ids for one in [number] * (GRID[1] if number == IMAGE else 1)]
    assert wide == processing(noises(1, *SIZE), asked(WORDS, 1))["input_ids"][0].tolist()
    assert (ids.count(IMAGE), ids.count(BREAK), ids.count(STOP)) == (4, 3, 1)


@pytest.mark.parametrize("name", SOME)
def test_pruned_equals_the_torch_reference(bundle: Callable[[str], Made], name: str) -> None:
    """Which tokens are kept, by a pruner and cues of the reference's own making, and what is said then."""
    made, (_, method, _, wishes) = bundle(name), BUNDLES[name]
    report = open_bundle(made.folder).manifest.parity["generation"]
    steps = 2 if wishes.get("verify") == "layers" else STEPS
    assert report and all(one["tokens"] == one["equal"] == steps for one in report.values())
    if method in ("none", "pyramiddrop"):  # whose sites the export has already held against torch
        return

    def ids_of(picture: Any, pipe: Pipeline) -> Any:
        edge = 1 if name.startswith("pixtral") else 2
        longest = max(pipe.manifest.image.image_size)
        return processed([picture], asked(WORDS, 1), longest, edge)["input_ids"]

    check_choice(made, WORDS, ids_of)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ministral3-half", "ministral3-tensorrt", "ministral3-jetpack6", "mistral-tensorrt"]
)
def test_other_precisions_and_targets_answer(bundle: Callable[[str], Made], name: str) -> None:
    """The export held them against torch on ONNX Runtime; here is what it found, and TensorRT 10.3's list."""
    opened = open_bundle(bundle(name).folder)
    report = opened.manifest.parity["generation"]
    assert report and all(one["tokens"] == STEPS for one in report.values())
    if name.endswith("jetpack6"):
        assert [line for file in opened.manifest.graphs for line in refused(opened.path(file))] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ministral3-vispruner", "ministral3-none", "ministral3-original", "pixtral-vispruner"]
)
def test_several_pictures_and_a_conversation(bundle: Callable[[str], Made], name: str) -> None:
    made, size = bundle(name), SMALL["image_size"] if name.startswith("pixtral") else SIZE
    check_answers(made.folder, made.model, of(name), size, [asked(WORDS, 2), TALK])
    check_batch(made.folder, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ministral3-fastv", "mistral-fastv"])
def test_text_alone(bundle: Callable[[str], Made], name: str) -> None:
    check_text_alone(bundle(name))


@pytest.mark.slow
def test_openvino_answers_the_same(bundle: Callable[[str], Made]) -> None:
    check_openvino(bundle("ministral3-fastv").folder, SIZE, WORDS, 6)


@pytest.mark.slow
@pytest.mark.trtrtx
@pytest.mark.skipif(MISSING, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("name", ["ministral3-tensorrt", "mistral-tensorrt"])
def test_every_graph_builds_with_tensorrt_rtx(bundle: Callable[[str], Made], name: str) -> None:
    check_builds(bundle(name).folder, ENGINE)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"text_config": {"model_type": "mistral4"}}, "decoder is 'mistral4'; supported .* ministral3"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "supported towers: pixtral"),
        ({"vision_feature_layer": [-2, -1]}, "only one layer, a whole number"),
    ],
)
def test_a_config_that_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(VtpError, match=message):
        Mistral3.check(config)


def test_a_llava_with_pixtrals_tower_is_a_family_of_its_own() -> None:
    config: dict[str, Any] = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    assert find_family({**config, "vision_config": {"model_type": "pixtral"}}) is Pixtral
    assert find_family(config) is Llava and find_family({**config, "vision_config": {}}) is Llava
    with pytest.raises(VtpError, match="vision_feature_select_strategy must be 'full'"):
        Pixtral.check({"vision_config": {"model_type": "pixtral"}})


def test_what_cannot_be_asked_for(saved: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = saved(save_mistral3, "mistral")
    with pytest.raises(UsageError, match="not made of whole tokens; give multiples of 8"):
        load(folder, "float32", (36, 40))
    with pytest.raises(UsageError, match="72x32 is larger than this processor makes pictures: 64x64"):
        load(folder, "float32", (32, 72))
    assert load(folder, "float32").family.grid == (8, 8)


def test_a_processor_that_makes_other_tokens(tmp_path: Path) -> None:
    save_mistral3(tmp_path, "mistral")
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "spatial_merge_size": 1}))
    with pytest.raises(VtpError, match="tokens of 4 pixels along an edge, the model takes 8; fix patch_size"):
        load(tmp_path, "float32")
