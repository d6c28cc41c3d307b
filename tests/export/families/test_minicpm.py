"""MiniCPM-V 4.6: a tower that merges patches on the way, Qwen3.5's decoder, bundles against transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_nearest_position_ids

from vtp.engines import UsageError, VtpError
from vtp.export.checkpoint.processors import spec_from_processor
from vtp.export.cli import main
from vtp.export.families import find_family
from vtp.export.families.minicpm.tower import nearest_places
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.preprocess import preprocess, source_box, spec_from_json, spec_to_json
from vtp.runtime.prompt.prompter import Prompter

from ...models.tiny_minicpm import minicpm_images, processed, save_minicpm, unpacked
from ...once import Once
from ...oracles.joining_rows import check_slots
from ...oracles.several_pictures import asked, by_transformers
from .compared import Made, bundles_of, check_answers_of_any_size, check_tower, follow, noise

SIZE, COUNT = (32, 48), 6
WORDS = "what shape is the red ?"
MODELS: dict[str, dict[str, Any]] = {
    "short": {"vision_layers": 2, "insert": 0},
    "deep": {"layers": 4, "vision_layers": 4, "insert": 2, "seed": 1, "side": 7},
}
BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    "short-fastervlm": ("short", {"method": "fastervlm", "keep_tokens": f"2,{COUNT}"}),
    "deep-none": ("deep", {"method": "none"}),
    "deep-fastv": ("deep", {"method": "fastv", "keep_tokens": "3"}),
    "deep-divprune": ("deep", {"method": "divprune", "keep_tokens": "3"}),
    "deep-visionzip": ("deep", {"method": "visionzip", "keep_tokens": "3"}),
    "deep-hiprune": ("deep", {"method": "hiprune", "keep_tokens": "3"}),
    "deep-cdpruner": ("deep", {"method": "cdpruner", "keep_tokens": "3"}),
}
FIRST = "short-fastervlm"  # no bundle is quick: Qwen3.5's tests hold the decoder, and here the tower's do


@pytest.fixture(scope="module")
def folders(saved: Callable[..., Any]) -> Callable[[str], tuple[Path, Any]]:
    """Folder and model by name; written at the first call."""
    return lambda name: saved(save_minicpm, **MODELS[name])


@pytest.fixture(scope="module")
def bundle(once: Once, folders: Callable[[str], Any]) -> Callable[[str], Made]:
    return bundles_of(BUNDLES, once, folders, max_length=192, image_size=SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [FIRST, "deep-none"])
def test_all_tokens_say_what_transformers_says(bundle: Callable[[str], Made], name: str) -> None:
    """From picture and words on: preprocessing, prompt, tower, decoder; 16 greedy tokens, their logits."""
    made, picture = bundle(name), noise(*SIZE, seed=3)
    given = processed(picture, asked(WORDS, 1))
    said, logits = by_transformers(made.model, given, 16)
    opened = open_bundle(made.folder)
    prompter = Prompter(opened.manifest.text, opened.path("tokenizer.json"))
    prompt, pixels = prompter.encode(prompter.messages_for(WORDS)), preprocess(picture, opened.manifest.image)
    assert np.array_equal(pixels, unpacked(given))
    image = made.model.config.image_token_id
    wanted_ids = given["input_ids"][0].tolist()
    assert [one for one in prompt.ids if one != image] == [one for one in wanted_ids if one != image]
    tokens, position = follow(made.folder, pixels, prompt.ids, prompt.image_start, logits)
    assert position == len(wanted_ids) and tokens == said
    reference = find_family(made.model.config.to_dict()).reference
    ids, rows = given["input_ids"], torch.from_numpy(pixels)
    alone = reference_generate(made.model, None, ids, rows, 16, image_size=SIZE, reference=reference)
    assert alone.token_ids == tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUNDLES if not name.endswith("none")])
def test_pruned_equals_the_torch_reference(bundle: Callable[[str], Made], name: str) -> None:
    """The export's own check ran; here is what it found, and that every picture can be answered."""
    check_answers_of_any_size(bundle(name), WORDS, COUNT)


@pytest.mark.parametrize("name", MODELS)
def test_the_tower_is_transformers(folders: Callable[[str], Any], name: str) -> None:
    """Features and cues, in front of the merging and behind it, against hooks in an unmodified model."""
    check_tower(*folders(name), SIZE, ["early_scores", "middle_received"])


@pytest.mark.parametrize(("grid", "side"), [((8, 12), 5), ((32, 32), 70), ((28, 36), 14), ((1, 3), 3)])
def test_places_are_transformers(grid: tuple[int, int], side: int) -> None:
    wanted = get_vision_nearest_position_ids(torch.tensor([grid]), side)
    assert torch.equal(nearest_places(grid, side), wanted)


@pytest.mark.slow
def test_slots_join_and_leave(bundle: Callable[[str], Made]) -> None:
    check_slots(bundle(FIRST).folder, "ort-cpu", SIZE)


@pytest.mark.parametrize("size", [(32, 48), (40, 40), (300, 200), (7, 5), (9, 60)])
@pytest.mark.parametrize("settings", [{}, {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.7]}])
def test_pixels_are_transformers(settings: dict[str, Any], size: tuple[int, int]) -> None:
    processor, picture = minicpm_images(slice_mode=False, **settings), noise(*size, seed=2)
    given = processor([picture], return_tensors="pt")
    rows, columns = given["target_sizes"][0].tolist()
    made_for = (rows * 4, columns * 4)
    spec = spec_from_processor(json.loads(processor.to_json_string()), made_for, "refuse")
    assert np.array_equal(preprocess(picture, spec), unpacked(given))
    assert spec_from_json(spec_to_json(spec)) == spec
    box = source_box(spec, size[1], size[0])
    assert (box.right, box.bottom) == (size[1], size[0])
    if rows != columns:
        with pytest.raises(VtpError, match="does not have the layout that this bundle was made for"):
            preprocess(noise(50, 50), spec)


@pytest.mark.slow
def test_several_pictures_and_prefixes_are_refused(bundle: Callable[[str], Made]) -> None:
    folder = bundle(FIRST).folder
    with Pipeline.load(folder) as pipe, pytest.raises(UsageError, match="one picture"):
        pipe.generate([noise(*SIZE)] * 2, "which ?")
    with pytest.raises(UsageError, match="its decoder has layers with a state"):
        Pipeline.load(folder, prefix_caching=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--image-size", "40x24"],
            "40x24 is not one that this processor gives a picture of that shape; give 48x32",
        ),
        (["--target", "tensorrt"], "target tensorrt has no operator for linear attention"),
        (
            ["--tower", "tome"],
            "does not serve tower tome: its tower merges patches between two of its blocks",
        ),
    ],
)
def test_refused_in_one_line(
    folders: Callable[[str], Any], tmp_path: Path, capsys: Any, flags: list[str], message: str
) -> None:
    folder, _ = folders("short")
    argv = ["--model", str(folder), "-o", str(tmp_path / "out"), "--method", "none", *flags]
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample_mode": "4x"}, "downsample_mode is '4x'; supported: '16x'"),
        ({"insert_layer_id": 12}, "insert_layer_id is 12; it must be one of the tower's 12 blocks"),
        ({"insert_layer_id": -1}, "insert_layer_id is -1; it must be one"),
        ({"merger_times": 2}, "merger_times is 2; supported: 1"),
        ({"vision_config": {"window_kernel_size": [4, 4]}}, r"window_kernel_size is \[4, 4\]; supported"),
        ({"text_config": {"model_type": "qwen2"}}, "this model's decoder is 'qwen2'"),
    ],
)
def test_configs_that_are_not_served(change: dict[str, Any], message: str) -> None:
    config = {"architectures": ["MiniCPMV4_6ForConditionalGeneration"], **change}
    with pytest.raises(VtpError, match=message):
        find_family(config).check(config)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("minicpmv4_7", "Canvas M-RoPE"), ("qwen3_5_moe", "routes every token to experts of its own")],
)
def test_relatives_are_refused_with_the_reason(model_type: str, message: str) -> None:
    with pytest.raises(
        VtpError, match=f"ForConditionalGeneration is not supported: .*{message}.*it would take"
    ):
        find_family({"model_type": model_type})
