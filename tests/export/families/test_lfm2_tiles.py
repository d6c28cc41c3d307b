"""LFM2-VL's tiles: bundles against transformers on pictures that its processor cuts by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import VtpError
from vtp.export.checkpoint.loading import load
from vtp.export.families import find_family
from vtp.export.plan.share import dealt
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter
from vtp.runtime.transformers_api.inputs import read_rows

from ...models.tiny_lfm2 import lfm2_processor, save_lfm2, unpadded
from ...once import Once
from ...oracles.joining_rows import check_slots
from ...oracles.several_pictures import TALK, Turns, asked, by_transformers, check_answers, check_batch
from ...oracles.tensorrt_10_3 import refused
from .compared import (
    Made,
    bundles_of,
    check_answers_of_any_size,
    check_openvino,
    check_tower,
    follow,
    marked,
    noise,
)

WORDS = "what shape is the red ?"
# Height and width -> grid of tiles, visual tokens of every view.
WIDE, TALL, SQUARE = (44, 88), (90, 58), (64, 64)
VIEWS = {WIDE: ((1, 2), [16, 16, 18]), TALL: ((3, 2), [16] * 6 + [18]), SQUARE: ((2, 2), [16] * 4 + [16])}
MODELS: dict[str, dict[str, Any]] = {
    "early": {"kinds": "cacca", "seed": 3},
    "late": {"kinds": "ccacca", "seed": 1, "kernel": 4, "conv_bias": True, "layernorm": False, "side": 12},
}
# Bundle: model, wishes.
BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    "wide-fastervlm": ("early", {"image_size": WIDE, "method": "fastervlm", "keep_tokens": "9,50"}),
    "wide-none": ("late", {"image_size": WIDE, "method": "none"}),
    "tall-none": ("late", {"image_size": TALL, "method": "none"}),
    "square-none": ("early", {"image_size": SQUARE, "method": "none"}),
    "wide-vispruner": ("late", {"image_size": WIDE, "method": "vispruner", "keep_tokens": "7,20"}),
    "tall-divprune": ("late", {"image_size": TALL, "method": "divprune", "keep_tokens": "12"}),
    "square-visionzip": ("early", {"image_size": SQUARE, "method": "visionzip", "keep_tokens": "9"}),
    "wide-fastv": ("early", {"image_size": WIDE, "method": "fastv", "keep_tokens": "9"}),
    "wide-cdpruner": ("late", {"image_size": WIDE, "method": "cdpruner", "keep_tokens": "9"}),
    "wide-original": (
        "late",
        {
            "image_size": WIDE,
            "method": "vispruner",
            "keep_tokens": "9",
            "method_options": ["positions=original"],
        },
    ),
    "wide-shared": (
        "late",
        {"image_size": WIDE, "method": "hiprune", "keep_tokens": "10", "share": "tile"},
    ),
    "wide-half": ("early", {"image_size": WIDE, "method": "fastv", "keep_tokens": "9", "dtype": "float16"}),
    "wide-layers": ("early", {"image_size": WIDE, "method": "none", "verify": "layers"}),
    "wide-jetpack6": (
        "early",
        {"image_size": WIDE, "method": "fastv", "keep_tokens": "9", "target": "jetpack6"},
    ),
}
QUICK = "wide-fastervlm"
NAMES = marked(BUNDLES, [QUICK])
WHOLE = [item for name, item in NAMES.items() if name == QUICK or name.endswith("none")]
PRUNED = [item for name, item in NAMES.items() if not name.endswith(("none", "layers"))]


@pytest.fixture(scope="module")
def folders(saved: Callable[..., Any]) -> Callable[[str], tuple[Path, Any]]:
    """Folder and model by name; written at the first call."""
    return lambda name: saved(save_lfm2, **MODELS[name])


@pytest.fixture(scope="module")
def bundle(once: Once, folders: Callable[[str], Any]) -> Callable[[str], Made]:
    return bundles_of(BUNDLES, once, folders, max_length=384)


def processed(pictures: list[Image.Image], turns: Turns) -> Any:
    """transformers' own processing of pictures and a talk, as the model's folder sets it: with tiles."""
    processor = lfm2_processor()
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    return processor(images=pictures, text=text, return_tensors="pt")


@pytest.mark.parametrize("name", WHOLE)
def test_all_tokens_say_what_transformers_says(bundle: Callable[[str], Made], name: str) -> None:
    """From picture and words on: tiles, marks, tower, decoder; 24 greedy tokens, their logits."""
    made = bundle(name)
    assert made.image_size is not None
    picture, (_, runs) = noise(*made.image_size, seed=3), VIEWS[made.image_size]
    given = processed([picture], asked(WORDS, 1))
    assert len(given["pixel_values"]) == len(runs)
    said, logits = by_transformers(made.model, given, 24)
    opened = open_bundle(made.folder)
    assert list(opened.manifest.runs) == runs and opened.manifest.visual.count == sum(runs)
    prompter = Prompter(opened.manifest.text, opened.path("tokenizer.json"))
    prompt, pixels = prompter.encode(prompter.messages_for(WORDS)), preprocess(picture, opened.manifest.image)
    assert np.array_equal(pixels, unpadded(given).numpy())
    image, wanted_ids = made.model.config.image_token_id, given["input_ids"][0].tolist()
    lengths = iter(runs)
    written = [item for one in prompt.ids for item in [one] * (next(lengths) if one == image else 1)]
    assert written == wanted_ids
    ((read, _),) = read_rows(opened.manifest, given["input_ids"], {"pixel_values": unpadded(given)})
    assert (read.ids, read.image_starts) == (prompt.ids, prompt.image_starts)
    tokens, position = follow(made.folder, pixels, prompt.ids, prompt.image_start, logits)
    assert position == len(wanted_ids) and tokens == said
    alone = reference_generate(
        made.model,
        None,
        given["input_ids"],
        unpadded(given),
        24,
        image_size=made.image_size,
        reference=find_family(made.model.config.to_dict()).reference,
        view_grids=opened.manifest.image.view_grids,
    )
    assert alone.token_ids == tokens


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_equals_the_torch_reference(bundle: Callable[[str], Made], name: str) -> None:
    """The export's own check ran; here is what it found, and that every picture can be answered."""
    check_answers_of_any_size(bundle(name), WORDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [QUICK, "tall-none", "wide-vispruner", "wide-original", "wide-cdpruner"])
def test_several_pictures(bundle: Callable[[str], Made], name: str) -> None:
    made = bundle(name)
    assert made.image_size is not None
    talks = [asked(WORDS, 2), TALK] if name != "tall-none" else [asked(WORDS, 2)]
    check_answers(made.folder, made.model, processed, made.image_size, talks, unpadded)


@pytest.mark.slow
def test_a_batch_says_what_each_says_alone(bundle: Callable[[str], Made]) -> None:
    check_batch(bundle(QUICK).folder, WIDE)


@pytest.mark.slow
def test_slots_join_and_leave(bundle: Callable[[str], Made]) -> None:
    check_slots(bundle(QUICK).folder, "ort-cpu", WIDE)


@pytest.mark.slow
def test_every_tile_keeps_its_share(bundle: Callable[[str], Made]) -> None:
    with Pipeline.load(bundle("wide-shared").folder, threads=1) as pipe:
        kept = pipe.generate(noise(*WIDE), WORDS, max_new_tokens=2).kept
    ends, lengths = [16, 32, 50], [16, 16, 18]
    found = Counter(next(number for number, end in enumerate(ends) if place < end) for place in kept)
    assert [found[number] for number in range(3)] == dealt(lengths, 10)


@pytest.mark.slow
def test_layers_are_compared_in_tiles_too(bundle: Callable[[str], Made]) -> None:
    parity = open_bundle(bundle("wide-layers").folder).manifest.parity
    assert parity["mode"] == "layers" and parity["borders"]["vision_encoder"] > 0


@pytest.mark.slow
def test_openvino_says_the_same(bundle: Callable[[str], Made]) -> None:
    check_openvino(bundle(QUICK).folder, WIDE, WORDS, 9)


@pytest.mark.slow
def test_jetpack6_writes_what_tensorrt_10_3_takes(bundle: Callable[[str], Made]) -> None:
    paths = list(bundle("wide-jetpack6").folder.glob("*.onnx"))
    assert [line for path in paths for line in refused(path)] == []


@pytest.mark.parametrize("size", VIEWS)
def test_the_tower_is_transformers(folders: Callable[[str], Any], size: tuple[int, int]) -> None:
    """Features and cues of views of one shape and of two, against hooks in an unmodified model."""
    folder, model = folders("late")
    *_, family = check_tower(folder, model, size, ["early_scores", "middle_received"])
    tiles, runs = VIEWS[size]
    assert (family._tiles, list(family.view_tokens), family.grid) == (tiles, runs, (1, sum(runs)))
    assert [len(tile.places) for tile in family.tiles] == runs and "several tiles" in family.lacks["grid"]


def test_one_piece_is_one_grid_and_the_default_says_so(folders: Callable[[str], Any]) -> None:
    folder, _ = folders("early")
    asked_for, tiles, default = (load(folder, "float32", size) for size in [(32, 48), WIDE, None])
    family = asked_for.family
    assert (family.grid, dict(family.lacks), list(family.tiles)) == ((4, 6), {}, [])
    assert not [line for model in (asked_for, tiles) for line in model.notes if "tiles" in line]
    assert [line for line in default.notes if "in one piece of 32x32; the model's own processor cuts" in line]


def test_marks_that_the_tokenizer_lacks_are_named(folders: Callable[[str], Any]) -> None:
    folder, _ = folders("early")
    with pytest.raises(VtpError, match=r"does not know <\|img_row_1_col_5\|>, <\|img_row_1_col_6\|>, "):
        load(folder, "float32", (20, 200))  # ten tiles in a row; the tokenizer has marks for four
