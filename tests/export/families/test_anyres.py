"""LLaVA-NeXT and LLaVA-OneVision: the order of their tokens, and bundles against transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextProcessor
from transformers.image_processing_utils import select_best_resolution

from vtp.engines import UsageError, VtpError
from vtp.export.cli import main
from vtp.export.exporter import Request, export
from vtp.export.families.llava.tiles import Views
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.preprocess import preprocess

from ...models.tiny import BOS, CHAT_TEMPLATE, IMAGE, tiny_tokenizer
from ...models.tiny_families import GRIDS, image_processor, packed, save_anyres, tiny_anyres
from ...once import Once
from .compared import Made, bundles_of, check_answers_of_any_size, follow, marked, noise

# (height, width): two by two views, with padding above and below cut off, and three views beside one another.
SIZES = {"square": (56, 56), "wide": (40, 56), "row": (28, 84)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "next": ("llava_next", {}),
    "next_deep": ("llava_next", {"layers": 4}),
    "next_mistral": ("llava_next", {"decoder": "mistral", "seed": 1}),
    "onevision": ("llava_onevision", {"decoder": "qwen2", "vision": "siglip", "seed": 2}),
}
BUNDLES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "next-none": ("next", "wide", {"method": "none"}),
    "next-row-none": ("next_mistral", "row", {"method": "none"}),
    "next-vispruner": ("next", "wide", {"method": "vispruner", "keep_tokens": "9,20"}),
    "next-original": (
        "next",
        "wide",
        {"method": "vispruner", "keep_tokens": "9", "method_options": ["positions=original"]},
    ),
    "next-divprune": ("next", "wide", {"method": "divprune", "keep_tokens": "12"}),
    "next-fastv": ("next", "wide", {"method": "fastv", "keep_tokens": "10"}),
    "next-visionzip": ("next", "wide", {"method": "visionzip", "keep_tokens": "12"}),
    "next-sparsevlm": ("next_deep", "wide", {"method": "sparsevlm", "keep_tokens": "12"}),
    "onevision-none": ("onevision", "wide", {"method": "none"}),
    "onevision-square-none": ("onevision", "square", {"method": "none"}),
    "onevision-vispruner": ("onevision", "wide", {"method": "vispruner", "keep_tokens": "9"}),
    "onevision-holov": ("onevision", "wide", {"method": "holov", "keep_tokens": "12"}),
    "onevision-fastv": ("onevision", "wide", {"method": "fastv", "keep_tokens": "10"}),
}
SLOW = {"next-row-none", "next-original", "next-visionzip", "next-sparsevlm", "onevision-square-none"}
SLOW |= {"onevision-holov", "onevision-fastv", "next-divprune"}
NAMES = marked(BUNDLES, BUNDLES.keys() - SLOW)
UNPRUNED = [item for name, item in NAMES.items() if name.endswith("none")]
PRUNED = [item for name, item in NAMES.items() if not name.endswith("none")]
EDGES = st.integers(1, 2000)


@pytest.fixture(scope="module")
def folders(saved: Callable[..., Any]) -> Callable[[str], tuple[Path, Any]]:
    """Folder and model by name; written at the first call."""

    def get(name: str) -> tuple[Path, Any]:
        kind, options = MODELS[name]
        return saved(save_anyres, kind, **options)

    return get


@pytest.fixture(scope="module")
def bundle(once: Once, folders: Callable[[str], Any]) -> Callable[[str], Made]:
    table = {name: (kind, {"image_size": SIZES[size], **own}) for name, (kind, size, own) in BUNDLES.items()}
    return bundles_of(table, once, folders, max_length=256)


# -- the order of the tokens ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return {kind: tiny_anyres(kind, **options) for kind, options in MODELS.values()}


@settings(max_examples=300, deadline=None)
@given(EDGES, EDGES, st.sampled_from(["llava_next", "llava_onevision"]))
def test_the_order_is_transformers(plain: dict[str, Any], height: int, width: int, kind: str) -> None:
    """Every patch of every view carries its own number through transformers' packing."""
    model, side = plain[kind], 4
    best = select_best_resolution((height, width), model.config.image_grid_pinpoints)
    views = Views(side, (best[0] // 28, best[1] // 28), (height, width))
    assert views.tiles in GRIDS
    numbers = torch.arange(1.0, 1 + views.count * side**2).view(views.count, side**2, 1)
    whole = packed(model, numbers, (height, width), lines=True).flatten()
    bare = packed(model, numbers, (height, width), lines=False).flatten()
    assert torch.equal(views.order() + 1.0, bare)
    assert torch.equal(views.places(), whole.nonzero().flatten())
    assert torch.equal(torch.cat([torch.zeros(1), bare])[views.lines()], whole)


# -- generation ----------------------------------------------------------------------------------------------


def transformers_answer(made: Made, picture: Image.Image, words: list[int], steps: int) -> Any:
    """transformers' own processing and greedy generation of a picture between BOS and `words`."""
    model, processor = made.model, image_processor(made.model)
    given = processor(picture, return_tensors="pt")
    count = (
        model.model.get_image_features(given["pixel_values"], given["image_sizes"]).pooler_output[0].shape[0]
    )
    ids = torch.tensor([[BOS, *[IMAGE] * count, *words]])
    model.generation_config.eos_token_id = None
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=given["pixel_values"],
        image_sizes=given["image_sizes"],
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    ), count


@pytest.mark.parametrize("name", UNPRUNED)
def test_unpruned_equals_transformers(bundle: Callable[[str], Made], name: str) -> None:
    """From the picture on: preprocessing, tiles, packing, decoder; 24 greedy tokens and their logits."""
    made, words = bundle(name), [40, 50, 60, 70]
    picture = noise(*made.image_size, seed=3)
    with torch.no_grad():
        answer, count = transformers_answer(made, picture, words, 24)
    manifest = open_bundle(made.folder).manifest
    assert manifest.visual.count == count
    tokens, _ = follow(
        made.folder, preprocess(picture, manifest.image), [BOS, IMAGE, *words], 1, answer.logits
    )
    assert tokens == answer.sequences[0, -24:].tolist()


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_equals_the_torch_reference(bundle: Callable[[str], Made], name: str) -> None:
    """The export's own check ran; here is what it found, and that every picture can be answered."""
    check_answers_of_any_size(bundle(name), "what is it ?")


def test_the_whole_way_equals_transformers_processor(bundle: Callable[[str], Made]) -> None:
    """Pictures and words in, tokens out: the processor's placeholders and chat template included."""
    made = bundle("next-none")
    processor = LlavaNextProcessor(
        image_processor=image_processor(made.model),
        tokenizer=tiny_tokenizer(),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    made.model.generation_config.eos_token_id = None
    words = "what shape is the red ?"
    with Pipeline.load(made.folder) as pipe:
        for count in (1, 2):
            pictures = [noise(*made.image_size, seed=5 + number) for number in range(count)]
            content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": words}]
            turns = [{"role": "user", "content": content}]
            text = processor.apply_chat_template(turns, add_generation_prompt=True)
            given = processor(images=pictures, text=text, add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                wanted = made.model.generate(**given, max_new_tokens=16, do_sample=False)[0, -16:].tolist()
            result = pipe.generate(pictures, words, max_new_tokens=16)
            assert result.token_ids == wanted[: len(result.token_ids)]
            assert len(result.token_ids) == 16 or result.finish_reason == "eos"
            text_tokens = given["input_ids"].shape[1] - result.visual_tokens.before
            assert result.prompt_tokens == text_tokens


def test_pictures_in_tiles_go_in_batches(bundle: Callable[[str], Made]) -> None:
    made, prompts = bundle("next-vispruner"), ["what ?", "how many circle where is the blue ?"]
    pictures = [noise(*made.image_size, seed=seed) for seed in (1, 2)]
    with Pipeline.load(made.folder) as pipe:
        batch = pipe.generate_batch(pictures, prompts, max_new_tokens=12)
        for picture, words, found in zip(pictures, prompts, batch, strict=True):
            alone = pipe.generate(picture, words, max_new_tokens=12)
            assert (found.token_ids, found.kept) == (alone.token_ids, alone.kept)
        both = pipe.generate(pictures, "what ?", max_new_tokens=1)
        assert both.kept == [found.kept for found in batch]


def test_onevision_takes_one_picture(bundle: Callable[[str], Made]) -> None:
    made = bundle("onevision-none")
    refused = pytest.raises(UsageError, match=r"one picture per prompt, not 2: .* family llava_onevision")
    with Pipeline.load(made.folder) as pipe, refused:
        pipe.generate([noise(*made.image_size)] * 2, "what ?")


def test_a_bundle_may_refuse_other_shapes(bundle: Callable[[str], Made], tmp_path: Path) -> None:
    made, folder = bundle("next-none"), tmp_path / "strict"
    shutil.copytree(made.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["image"]["fit"] = "refuse"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with Pipeline.load(folder) as pipe:
        pipe.warmup()
        assert pipe.generate(noise(80, 112), "what ?", max_new_tokens=1).token_ids
        with pytest.raises(VtpError, match=r"90x31 does not have the layout .* of 56x40 pixels"):
            pipe.generate(noise(31, 90), "what ?")


def test_vision_sites_keep_no_ends_of_lines(bundle: Callable[[str], Made]) -> None:
    """And their indices count within the N tokens, as those of decoder sites do."""
    made = bundle("next-vispruner")
    places = set(Views(4, (2, 2), made.image_size).places().tolist())
    with Pipeline.load(made.folder) as pipe:
        result = pipe.generate(noise(*made.image_size), "what ?", max_new_tokens=1, keep_tokens=20)
        assert set(result.kept) <= places and max(result.kept) > 16
        assert pipe.manifest.visual.count == 16 + 6 * (8 + 1) == len(places) + 6


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "adaptprune"], "needs grid, .* its tokens lie in several tiles; nearest .* fastv"),
        (["--method", "vispruner", "--keep-tokens", "66"], "66 is outside the 64 visual tokens"),
        (["--image-size", "ten"], "image-size 'ten' is not a valid size; give WIDTHxHEIGHT"),
        (["--image-fit", "squeeze"], "unknown image-fit 'squeeze'; choose one of letterbox"),
    ],
)
def test_refused_in_one_line(
    folders: Callable[[str], Any], tmp_path: Path, capsys: Any, flags: list[str], message: str
) -> None:
    folder, _ = folders("next")
    argv = ["--model", str(folder), "-o", str(tmp_path / "out"), "--image-size", "56x40", *flags]
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error


def test_a_processor_of_other_resolutions_is_refused(folders: Callable[[str], Any], tmp_path: Path) -> None:
    folder, _ = folders("next")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    path = other / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "image_grid_pinpoints": [[28, 56]]}))
    with pytest.raises(VtpError, match="disagree about a picture of 56x56"):
        export(Request(tmp_path / "out", model=str(other), method="none", image_size=(56, 56)))
    path.write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    with pytest.raises(VtpError, match="as kind 'clip', family llava_next takes anyres"):
        export(Request(tmp_path / "out", model=str(other), method="none"))


def test_an_image_size_that_onevision_would_resample_is_refused(
    folders: Callable[[str], Any], tmp_path: Path
) -> None:
    folder, _ = folders("onevision")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    path = other / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vision_aspect_ratio": "anyres_max_2"}))
    with pytest.raises(UsageError, match=r"56x56 gives 64 patches .* would resample \(anyres_max_2\)"):
        export(Request(tmp_path / "out", model=str(other), method="none", image_size=(56, 56)))
