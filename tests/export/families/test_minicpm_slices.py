"""MiniCPM-V's slices: pixels, and bundles against transformers on pictures that its processor cuts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vtp.engines import UsageError, VtpError
from vtp.export.checkpoint.loading import load
from vtp.export.checkpoint.processors import spec_from_processor
from vtp.export.families import find_family
from vtp.export.plan.share import dealt
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.preprocess import preprocess, source_boxes, spec_from_json, spec_to_json
from vtp.runtime.preprocess.fit import Layout
from vtp.runtime.preprocess.navit import NavitSlicesSpec, NavitSpec
from vtp.runtime.preprocess.pixels import paste
from vtp.runtime.prompt.prompter import Prompter

from ...models.tiny_minicpm import EDGE, PATCH, minicpm_images, processed, save_minicpm, unpacked
from ...once import Once
from ...oracles.joining_rows import check_slots
from ...oracles.several_pictures import asked, by_transformers
from .compared import Made, bundles_of, check_answers_of_any_size, check_tower, follow, noise

WORDS = "what shape is the red ?"
# Height and width -> grid of slices, visual tokens of every view, the whole first.
SQUARE, WIDE, TALL = (64, 96), (60, 150), (100, 50)
VIEWS = {SQUARE: ((2, 2), [6] * 5), WIDE: ((2, 3), [8] + [6] * 6), TALL: ((3, 1), [8] + [6] * 3)}
MODELS: dict[str, dict[str, Any]] = {
    "short": {"vision_layers": 2, "insert": 0},
    "deep": {"layers": 4, "vision_layers": 4, "insert": 2, "seed": 1, "side": 7},
}
BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    "square-fastervlm": ("short", {"image_size": SQUARE, "method": "fastervlm", "keep_tokens": "7,30"}),
    "wide-none": ("deep", {"image_size": WIDE, "method": "none"}),
    "tall-none": ("deep", {"image_size": TALL, "method": "none"}),
    "wide-vispruner": ("deep", {"image_size": WIDE, "method": "vispruner", "keep_tokens": "9"}),
    "tall-fastv": ("deep", {"image_size": TALL, "method": "fastv", "keep_tokens": "9"}),
    "tall-cdpruner": ("deep", {"image_size": TALL, "method": "cdpruner", "keep_tokens": "9"}),
    "wide-shared": (
        "deep",
        {"image_size": WIDE, "method": "hiprune", "keep_tokens": "10", "share": "tile"},
    ),
}
FIRST = "square-fastervlm"


@pytest.fixture(scope="module")
def folders(saved: Callable[..., Any]) -> Callable[[str], tuple[Path, Any]]:
    """Folder and model by name; written at the first call."""
    return lambda name: saved(save_minicpm, **MODELS[name])


@pytest.fixture(scope="module")
def bundle(once: Once, folders: Callable[[str], Any]) -> Callable[[str], Made]:
    return bundles_of(BUNDLES, once, folders, max_length=256)


def config_of(**changes: Any) -> dict[str, Any]:
    """What a model folder says of its pictures."""
    return json.loads(minicpm_images(**changes).to_json_string())


# -- pixels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [*VIEWS, (41, 40), (32, 33), (40, 40), (300, 200), (7, 300), (301, 299), (90, 31)]
)
@pytest.mark.parametrize("changes", [{}, {"max_slice_nums": 4, "image_mean": [0.4, 0.5, 0.6]}])
def test_pixels_and_slices_are_transformers(changes: dict[str, Any], size: tuple[int, int]) -> None:
    picture = noise(*size, seed=2)
    theirs = minicpm_images(**changes)([picture], return_tensors="pt")
    grid = tuple(theirs["grids"][0])
    if grid == (0, 0):  # one piece: no bundle with slices is made for such a size
        spec = spec_from_processor(config_of(**changes), (64, 96))
        assert isinstance(spec, NavitSlicesSpec) and spec.layout_of(size) is None
        return
    spec = spec_from_processor(config_of(**changes), size, "refuse")
    assert isinstance(spec, NavitSlicesSpec) and spec.layout.grid == grid
    found = preprocess(picture, spec)
    assert found.shape == spec.shape and np.array_equal(found, unpacked(theirs))
    assert np.array_equal(spec.view_grids, theirs["target_sizes"])
    assert spec_from_json(spec_to_json(spec)) == spec and spec.views == 1 + grid[0] * grid[1]


EDGES = st.one_of(st.integers(1, 60), st.integers(1, 4000))


@settings(max_examples=400, deadline=None)
@given(EDGES, EDGES, st.integers(2, 12))
@example(448, 448, 9)
@example(448, 449, 9)
@example(4000, 1, 9)
def test_layouts_are_transformers(height: int, width: int, most: int) -> None:
    theirs, size = minicpm_images(), (height, width)
    rule = {"scale_resolution": 448, "patch_size": 14, "downsample_mode": "16x"}
    config = {**config_of(max_slice_nums=most), "patch_size": 14, "scale_resolution": 448}
    spec = spec_from_processor(config, (999, 700))
    assert isinstance(spec, NavitSlicesSpec)
    grid = theirs.get_sliced_grid(size, most, 448)
    if grid is None:
        assert spec.layout_of(size) is None
    else:
        high, wide = theirs.get_refine_size(size, grid, allow_upscale=True, **rule)
        whole = theirs.find_best_resize(size, **rule)
        part = (high // grid[0], wide // grid[1])
        assert spec.layout_of(size) == Layout((grid[0], grid[1]), part, whole)


def test_other_shapes_are_padded_to_the_image_size_and_cut_as_transformers_would() -> None:
    spec = spec_from_processor(config_of(), WIDE)
    assert isinstance(spec, NavitSlicesSpec) and spec.layout == Layout((2, 3), (32, 48), (32, 64))
    picture = noise(60, 100)
    theirs = minicpm_images()([paste(picture, WIDE, (127, 127, 127))], return_tensors="pt")
    assert np.array_equal(preprocess(picture, spec), unpacked(theirs))
    whole, *parts = source_boxes(spec, 100, 60)
    assert (whole.left, whole.right, whole.top, whole.bottom) == (-25, 125, 0, 60) and len(parts) == 6
    assert parts[0][:2] == whole[:2] and parts[-1][2:] == whole[2:]
    with pytest.raises(VtpError, match="a picture of 100x60 does not have the layout that this bundle"):
        preprocess(picture, replace(spec, fit="refuse"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_slice_nums": 0}, "max_slice_nums is 0; it must be a positive number"),
        ({"max_slice_nums": 65}, "65 slices do not fit; the most must be 2 to 64"),
        ({"max_slice_nums": 1}, "96x64 is not one that this processor gives .* give 48x32"),
        ({"slice_mode": False}, "96x64 is not one that this processor gives .* give 48x32"),
    ],
)
def test_what_is_not_served(change: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, VtpError), match=message):
        spec_from_processor({**config_of(), **change}, SQUARE)


def test_sizes_of_one_piece_are_what_they_were() -> None:
    """By default, where asked for though the processor would cut a picture of that size, and in manifests."""
    for size in (None, (32, 48), (32, 64)):
        spec = spec_from_processor(config_of(), size)
        assert isinstance(spec, NavitSpec) and spec_from_json(spec_to_json(spec)) == spec
        assert spec.view_tokens == (np.prod(spec.image_size) // (4 * PATCH) ** 2,)
    assert EDGE**2 < 32 * 64
    section = spec_to_json(spec_from_processor(config_of(), SQUARE))
    with pytest.raises(VtpError, match="image size 40x40 is shown in one piece, and kind navit_slices cuts"):
        spec_from_json({**section, "image_height": 40, "image_width": 40})


# -- bundles -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [FIRST, "wide-none", "tall-none"])
def test_all_tokens_say_what_transformers_says(bundle: Callable[[str], Made], name: str) -> None:
    """From picture and words on: slices, marks, tower, decoder; 16 greedy tokens, their logits."""
    made = bundle(name)
    assert made.image_size is not None
    picture, (_, runs) = noise(*made.image_size, seed=3), VIEWS[made.image_size]
    theirs = processed(picture, asked(WORDS, 1), slices=True)
    assert len(theirs["target_sizes"]) == len(runs)
    said, logits = by_transformers(made.model, theirs, 16)
    opened = open_bundle(made.folder)
    assert list(opened.manifest.runs) == runs and opened.manifest.visual.count == sum(runs)
    prompter = Prompter(opened.manifest.text, opened.path("tokenizer.json"))
    prompt, pixels = prompter.encode(prompter.messages_for(WORDS)), preprocess(picture, opened.manifest.image)
    assert np.array_equal(pixels, unpacked(theirs))
    image, wanted_ids = made.model.config.image_token_id, theirs["input_ids"][0].tolist()
    lengths = iter(runs)
    written = [item for one in prompt.ids for item in [one] * (next(lengths) if one == image else 1)]
    assert written == wanted_ids
    tokens, position = follow(made.folder, pixels, prompt.ids, prompt.image_start, logits)
    assert position == len(wanted_ids) and tokens == said
    alone = reference_generate(
        made.model,
        None,
        theirs["input_ids"],
        torch.from_numpy(pixels),
        16,
        image_size=made.image_size,
        reference=find_family(made.model.config.to_dict()).reference,
        view_grids=opened.manifest.image.view_grids,
    )
    assert alone.token_ids == tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUNDLES if not name.endswith("none")])
def test_pruned_equals_the_torch_reference(bundle: Callable[[str], Made], name: str) -> None:
    """The export's own check ran; here is what it found, and that every picture can be answered."""
    check_answers_of_any_size(bundle(name), WORDS)


@pytest.mark.slow
def test_every_slice_keeps_its_share(bundle: Callable[[str], Made]) -> None:
    with Pipeline.load(bundle("wide-shared").folder, threads=1) as pipe:
        kept = pipe.generate(noise(*WIDE), WORDS, max_new_tokens=2).kept
    lengths = VIEWS[WIDE][1]
    ends = np.cumsum(lengths)
    found = Counter(int(np.searchsorted(ends, place, side="right")) for place in kept)
    assert [found[number] for number in range(7)] == dealt(lengths, 10)


@pytest.mark.slow
def test_slots_join_and_leave(bundle: Callable[[str], Made]) -> None:
    check_slots(bundle(FIRST).folder, "ort-cpu", SQUARE)


@pytest.mark.parametrize("size", VIEWS)
@pytest.mark.parametrize("name", MODELS)
def test_the_tower_is_transformers(folders: Callable[[str], Any], name: str, size: tuple[int, int]) -> None:
    """Features and cues of views of one shape and of two, in front of the merging and behind it."""
    *_, family = check_tower(*folders(name), size, ["early_scores", "middle_received"])
    slices, runs = VIEWS[size]
    assert (family._slices, list(family.view_tokens), family.grid) == (slices, runs, (1, sum(runs)))
    assert [len(tile.places) for tile in family.tiles] == runs and "several tiles" in family.lacks["grid"]


def test_one_piece_is_one_grid(folders: Callable[[str], Any]) -> None:
    folder, _ = folders("short")
    family = load(folder, "float32", (32, 48)).family
    assert (family.grid, dict(family.lacks), list(family.tiles)) == ((2, 3), {}, [])
