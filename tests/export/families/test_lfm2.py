"""LFM2-VL: patches of a grid, a decoder of convolutions and attention, and bundles against transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.engines.tensorrt.library import INSTALL
from vtp.export.cli import main
from vtp.export.families import find_family
from vtp.export.families.lfm2.places import resampling
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter

from ...models.tiny_lfm2 import lfm2_processor, save_lfm2
from ...once import Once
from ...oracles.joining_rows import check_slots
from ...oracles.several_pictures import TALK, Turns, asked, by_transformers, check_answers, check_batch
from ...oracles.tensorrt_10_3 import refused
from .compared import (
    Made,
    bundles_of,
    check_answers_of_any_size,
    check_builds,
    check_openvino,
    follow,
    marked,
    noise,
)

ENGINE = "tensorrt-rtx"
MISSING = util.find_spec("tensorrt_rtx") is None
TRT, JETPACK = {"target": "tensorrt"}, {"target": "jetpack6"}
SIZE, COUNT = (32, 48), 24  # as many patches as the processor pads to
WORDS = "what shape is the red ?"
MODELS: dict[str, dict[str, Any]] = {
    "lfm2": {"kinds": "ca", "vision_layers": 1},
    "early": {"kinds": "cacca", "seed": 3},
    "late": {"kinds": "ccacca", "seed": 1, "kernel": 4, "conv_bias": True, "layernorm": False},
    "wide": {"kinds": "aca", "seed": 2, "side": 12},
}
# Bundle: model, wishes.
BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2-fastervlm": ("lfm2", {"method": "fastervlm", "keep_tokens": f"5,{COUNT}"}),
    "wide-vispruner": ("wide", {"method": "vispruner", "keep_tokens": "5,9"}),
    "late-none": ("late", {"method": "none"}),
    "wide-none": ("wide", {"method": "none"}),
    "early-fastv": ("early", {"method": "fastv", "keep_tokens": "6"}),
    "late-dart": ("late", {"method": "dart", "keep_tokens": "6"}),
    "wide-divprune": ("wide", {"method": "divprune", "keep_tokens": "6"}),
    "wide-visionzip": ("wide", {"method": "visionzip", "keep_tokens": "7"}),
    "wide-vscan": ("wide", {"method": "vscan", "keep_tokens": "7"}),
    "wide-hiprune": ("wide", {"method": "hiprune", "keep_tokens": "7"}),
    "late-original": (
        "late",
        {"method": "vispruner", "keep_tokens": "5", "method_options": ["positions=original"]},
    ),
    "late-cdpruner": ("late", {"method": "cdpruner", "keep_tokens": "6"}),
    "early-tensorrt": ("early", {"method": "fastv", "keep_tokens": "6", **TRT}),
    "early-jetpack6": ("early", {"method": "fastv", "keep_tokens": "6", **JETPACK}),
    "late-half": ("late", {"method": "dart", "keep_tokens": "6", "dtype": "float16"}),
}
QUICK = "lfm2-fastervlm"
NAMES = marked(BUNDLES, [QUICK])
WHOLE = [item for name, item in NAMES.items() if name == QUICK or name.endswith("none")]
PRUNED = [item for name, item in NAMES.items() if not name.endswith("none")]


@pytest.fixture(scope="module")
def folders(saved: Callable[..., Any]) -> Callable[[str], tuple[Path, Any]]:
    """Folder and model by name; written at the first call."""
    return lambda name: saved(save_lfm2, **MODELS[name])


@pytest.fixture(scope="module")
def bundle(once: Once, folders: Callable[[str], Any]) -> Callable[[str], Made]:
    return bundles_of(BUNDLES, once, folders, max_length=192, image_size=SIZE)


def processed(pictures: list[Image.Image], turns: Turns) -> Any:
    """transformers' own processing of pictures and a talk."""
    processor = lfm2_processor()
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    return processor(images=pictures, text=text, return_tensors="pt")


# -- bundles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_all_tokens_say_what_transformers_says(bundle: Callable[[str], Made], name: str) -> None:
    """From picture and words on: preprocessing, prompt, tower, decoder; 24 greedy tokens, their logits."""
    made, picture = bundle(name), noise(*SIZE, seed=3)
    given = processed([picture], asked(WORDS, 1))
    said, logits = by_transformers(made.model, given, 24)
    opened = open_bundle(made.folder)
    prompter = Prompter(opened.manifest.text, opened.path("tokenizer.json"))
    prompt = prompter.encode(prompter.messages_for(WORDS))
    pixels = preprocess(picture, opened.manifest.image)
    assert np.array_equal(pixels, given["pixel_values"][0].numpy()) and len(given["pixel_values"]) == 1
    tokens, position = follow(made.folder, pixels, prompt.ids, prompt.image_start, logits)
    assert position == given["input_ids"].shape[1] and tokens == said
    alone = reference_generate(
        made.model,
        None,
        given["input_ids"],
        given["pixel_values"][0],
        24,
        image_size=SIZE,
        reference=find_family(made.model.config.to_dict()).reference,
    )
    assert alone.token_ids == tokens
    kinds = made.model.config.text_config.layer_types
    held = given["input_ids"].shape[1] + 23
    assert alone.cache_lengths == [0 if kind == "conv" else held for kind in kinds]


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_equals_the_torch_reference(bundle: Callable[[str], Made], name: str) -> None:
    """The export's own check ran; here is what it found, and that every picture can be answered."""
    made = bundle(name)
    manifest = check_answers_of_any_size(made, WORDS, COUNT)
    states = [state for graph in manifest.graphs.values() for state in graph.states]
    kinds = made.model.config.text_config.layer_types
    convolving = [number for number, kind in enumerate(kinds) if kind == "conv"]
    assert sorted(layer for state in states for layer in state.layers) == convolving


def test_a_batch_says_what_each_says_alone(bundle: Callable[[str], Made]) -> None:
    """Rows of unequal length: padding must not enter a state, nor a row that is over another's."""
    check_batch(bundle(QUICK).folder, SIZE)


def test_slots_join_and_leave(bundle: Callable[[str], Made], cpu_engine: str) -> None:
    check_slots(bundle(QUICK).folder, cpu_engine, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [QUICK, "late-none"])
def test_several_pictures(bundle: Callable[[str], Made], name: str) -> None:
    made = bundle(name)
    check_answers(made.folder, made.model, processed, SIZE, [asked(WORDS, 2), TALK])


@pytest.mark.slow
@pytest.mark.parametrize("name", [QUICK, "early-fastv"])
def test_openvino_says_the_same(bundle: Callable[[str], Made], name: str) -> None:
    check_openvino(bundle(name).folder, SIZE, WORDS, 5 if name == QUICK else 6)


@pytest.mark.slow
@pytest.mark.trtrtx
@pytest.mark.skipif(MISSING, reason=f"tensorrt_rtx is not installed: {INSTALL[ENGINE]}")
def test_every_graph_builds_with_tensorrt(bundle: Callable[[str], Made]) -> None:
    check_builds(bundle("early-tensorrt").folder, ENGINE)


@pytest.mark.slow
def test_jetpack6_writes_what_tensorrt_10_3_takes(bundle: Callable[[str], Made]) -> None:
    paths = list(bundle("early-jetpack6").folder.glob("*.onnx"))
    assert [line for path in paths for line in refused(path)] == []


# -- parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "grid"), [(4, (8, 12)), (16, (9, 5)), (3, (3, 3)), (5, (1, 20))])
def test_places_are_resampled_as_torch_does_it(side: int, grid: tuple[int, int]) -> None:
    table = torch.randn(side * side, 6, generator=torch.Generator().manual_seed(0))
    taps, weights = resampling(side, [grid])
    found = (table[taps] * weights.unsqueeze(2)).sum(dim=1)
    picture = table.T.reshape(1, 6, side, side)
    wanted = torch.nn.functional.interpolate(picture, grid, mode="bilinear", antialias=True)
    np.testing.assert_allclose(found.numpy(), wanted.reshape(6, -1).T.numpy(), atol=1e-6)


def test_prefix_caching_is_refused(bundle: Callable[[str], Made]) -> None:
    with pytest.raises(
        UsageError, match=r"family lfm2_vl\): its decoder has layers with a state, which cannot"
    ):
        Pipeline.load(bundle(QUICK).folder, prefix_caching=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "fastv"], "by attention_scores of layer 1, which has no attention .*layers 2, 5 have"),
        (["--method", "pyramiddrop"], "before decoder layer 1 by next_scores of layer 1, which has no"),
        (["--tower", "tome"], "does not serve tower tome: its tower takes patches of any size"),
        (
            ["--method", "none", "--image-size", "36x32"],
            "not made of whole visual tokens; give multiples of 8",
        ),
        (
            ["--method", "none", "--image-size", "64x48"],
            "has 3072 pixels; this processor shows at most 1536 in one piece, .* 3072 into tiles: give 40x32",
        ),
    ],
)
def test_refused_in_one_line(
    folders: Callable[[str], Any], tmp_path: Path, capsys: Any, flags: list[str], message: str
) -> None:
    folder, _ = folders("late")
    assert main(["--model", str(folder), "-o", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"text_config": {"model_type": "lfm2_moe"}},
            "this model's decoder is 'lfm2_moe'; supported .*: lfm2",
        ),
        ({"vision_config": {"model_type": "siglip"}}, "this model's tower is 'siglip'; supported towers"),
        ({"downsample_factor": 0}, "downsample_factor is 0; it must be a positive whole number"),
    ],
)
def test_configs_that_are_not_served(change: dict[str, Any], message: str) -> None:
    config = {"architectures": ["Lfm2VlForConditionalGeneration"], **change}
    with pytest.raises(VtpError, match=message):
        find_family(config).check(config)
