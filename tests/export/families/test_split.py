"""InternVL, Idefics3 and SmolVLM against transformers: tiles, shuffled patches, marks in the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import GptOssConfig, InternVLConfig, Qwen3Config, Qwen3MoeConfig

from vtp.engines import VtpError
from vtp.engines.tensorrt.library import INSTALL
from vtp.export.checkpoint.loading import load
from vtp.export.cli import main
from vtp.export.families import find_family
from vtp.export.families.tiled.internvl import InternVL
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter

from ...models.tiny_split import idefics3_processor, internvl_processor, save_idefics3, save_internvl
from ...once import Once
from ...oracles.several_pictures import TALK, Turns, asked, by_transformers, check_answers, check_batch
from ...oracles.tensorrt_10_3 import refused
from .compared import Made, Size, bundles_of, check_answers_of_any_size, check_builds, follow, marked, noise

ENGINE = "tensorrt-rtx"
MISSING = util.find_spec("tensorrt_rtx") is None
TRT, JETPACK = {"target": "tensorrt"}, {"target": "jetpack6"}
# Model: how it is saved, its processor, its options.
MODELS: dict[str, tuple[Callable[..., Any], Callable[[Any, Size], Any], dict[str, Any]]] = {
    "internvl": (save_internvl, internvl_processor, {}),
    "internvl_deep": (save_internvl, internvl_processor, {"decoder": "llama", "layers": 4, "seed": 1}),
    "internvl_normed": (
        save_internvl,
        internvl_processor,
        {
            "decoder": "qwen3",
            "vision_layers": 3,
            "use_qk_norm": True,
            "norm_type": "rms_norm",
            "attention_bias": True,
            "use_mean_pooling": False,
            "seed": 2,
        },
    ),
    "internvl_layer": (save_internvl, internvl_processor, {"feature_layer": -2, "seed": 3}),
    "idefics3": (save_idefics3, idefics3_processor, {"seed": 4}),
    "idefics3_deep": (save_idefics3, idefics3_processor, {"layers": 4, "decoder": "mistral", "seed": 5}),
    "idefics3_odd": (save_idefics3, idefics3_processor, {"side": 26, "vision_layers": 1, "seed": 6}),
    "smolvlm": (save_idefics3, idefics3_processor, {"kind": "smolvlm", "tied": True, "seed": 7}),
}
# Bundle: model, image size, wishes.
BUNDLES: dict[str, tuple[str, Size, dict[str, Any]]] = {
    "internvl-none": ("internvl", (28, 56), {"method": "none"}),
    "internvl-vispruner": ("internvl", (28, 56), {"method": "vispruner", "keep_tokens": "5,9"}),
    "internvl-layer-none": ("internvl_layer", (56, 28), {"method": "none"}),
    "internvl-normed-none": ("internvl_normed", (56, 56), {"method": "none"}),
    "internvl-normed-visionzip": ("internvl_normed", (56, 56), {"method": "visionzip", "keep_tokens": "7"}),
    "internvl-divprune": ("internvl", (28, 56), {"method": "divprune", "keep_tokens": "6"}),
    "internvl-fastv": ("internvl", (28, 56), {"method": "fastv", "keep_tokens": "6"}),
    "internvl-sparsevlm": ("internvl_deep", (28, 56), {"method": "sparsevlm", "keep_tokens": "6"}),
    "internvl-one-none": ("internvl_deep", (28, 28), {"method": "none"}),
    "internvl-one-adaptprune": ("internvl_deep", (28, 28), {"method": "adaptprune", "keep_tokens": "2"}),
    "idefics3-none": ("idefics3", (56, 84), {"method": "none"}),
    "idefics3-vispruner": ("idefics3", (56, 56), {"method": "vispruner", "keep_tokens": "3,11"}),
    "idefics3-original": (
        "idefics3",
        (28, 84),
        {"method": "vispruner", "keep_tokens": "3", "method_options": ["positions=original"]},
    ),
    "idefics3-odd-none": ("idefics3_odd", (182, 182), {"method": "none"}),
    "idefics3-divprune": ("idefics3", (56, 56), {"method": "divprune", "keep_tokens": "6"}),
    "idefics3-visionzip": ("idefics3", (56, 56), {"method": "visionzip", "keep_tokens": "8"}),
    "idefics3-cdpruner": ("idefics3", (56, 56), {"method": "cdpruner", "keep_tokens": "8"}),
    "idefics3-fastv": ("idefics3", (28, 56), {"method": "fastv", "keep_tokens": "5"}),
    "idefics3-sparsevlm": ("idefics3_deep", (56, 56), {"method": "sparsevlm", "keep_tokens": "6"}),
    "idefics3-pyramiddrop": ("idefics3_deep", (56, 56), {"method": "pyramiddrop", "keep_tokens": "6"}),
    "smolvlm-none": ("smolvlm", (56, 28), {"method": "none"}),
    "smolvlm-one-none": ("smolvlm", (28, 28), {"method": "none"}),
    "smolvlm-one-adaptprune": ("smolvlm", (28, 28), {"method": "adaptprune", "keep_tokens": "2"}),
    "smolvlm-divprune": ("smolvlm", (56, 56), {"method": "divprune", "keep_tokens": "6"}),
    "smolvlm-float16": ("smolvlm", (56, 56), {"method": "vispruner", "keep_tokens": "6", **TRT}),
    "smolvlm-fastv-float16": ("smolvlm", (56, 56), {"method": "fastv", "keep_tokens": "6", **TRT}),
    "smolvlm-fastv-jetpack6": ("smolvlm", (56, 56), {"method": "fastv", "keep_tokens": "6", **JETPACK}),
    "idefics3-jetpack6": ("idefics3", (56, 56), {"method": "vispruner", "keep_tokens": "6", **JETPACK}),
    "internvl-jetpack6": ("internvl_normed", (56, 28), {"method": "divprune", "keep_tokens": "6", **JETPACK}),
    "internvl-float16": ("internvl", (28, 56), {"method": "vispruner", "keep_tokens": "5", **TRT}),
}
SMALL = {"internvl-none", "internvl-vispruner", "idefics3-none", "idefics3-vispruner", "idefics3-fastv"}
NAMES = marked(BUNDLES, SMALL)
UNPRUNED = [item for name, item in NAMES.items() if name.endswith("none")]
PRUNED = [item for name, item in NAMES.items() if not name.endswith("none")]
WORDS = "what shape is the red ?"


@pytest.fixture(scope="module")
def folders(saved: Callable[..., Any]) -> Callable[[str], tuple[Path, Any]]:
    """Folder and model by name; written at the first call."""

    def get(name: str) -> tuple[Path, Any]:
        save, _, options = MODELS[name]
        return saved(save, **options)

    return get


@pytest.fixture(scope="module")
def bundle(once: Once, folders: Callable[[str], Any]) -> Callable[[str], Made]:
    table = {name: (kind, {"image_size": size, **own}) for name, (kind, size, own) in BUNDLES.items()}
    return bundles_of(table, once, folders, max_length=256)


def processed(made: Made, pictures: list[Image.Image], turns: Turns) -> Any:
    """transformers' own processing of pictures and a talk: tiles, chat template, marks, placeholders."""
    processor = MODELS[made.kind][1](made.model, made.image_size)
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    more = not text.startswith("<s>")  # as `apply_chat_template(tokenize=True)` does it
    return processor(images=pictures, text=text, add_special_tokens=more, return_tensors="pt")


@pytest.mark.parametrize("name", UNPRUNED)
def test_unpruned_equals_transformers(bundle: Callable[[str], Made], name: str) -> None:
    """From picture and words on: preprocessing, prompt, tower, decoder; 24 greedy tokens, their logits."""
    made = bundle(name)
    picture = noise(*made.image_size, seed=3)
    given = processed(made, [picture], asked(WORDS, 1))
    said, logits = by_transformers(made.model, given, 24)
    opened = open_bundle(made.folder)
    prompter = Prompter(opened.manifest.text, opened.path("tokenizer.json"))
    prompt, count = prompter.encode(prompter.messages_for(WORDS)), opened.manifest.visual.count
    image = made.model.config.image_token_id
    assert prompt.ids[prompt.image_start] == image
    wanted_ids = given["input_ids"][0].tolist()
    assert wanted_ids.count(image) == count and len(wanted_ids) == prompt.text_tokens + count
    assert [item for item in prompt.ids if item != image] == [item for item in wanted_ids if item != image]
    pixels = preprocess(picture, opened.manifest.image)
    assert np.array_equal(pixels, given["pixel_values"].reshape(pixels.shape).numpy())
    tokens, position = follow(made.folder, pixels, prompt.ids, prompt.image_start, logits)
    assert position == len(wanted_ids) and tokens == said


@pytest.mark.parametrize("name", UNPRUNED)
def test_the_reference_equals_transformers(bundle: Callable[[str], Made], name: str) -> None:
    """What pruned bundles are held against is the model itself where nothing is pruned."""
    made = bundle(name)
    given = processed(made, [noise(*made.image_size, seed=4)], asked(WORDS, 1))
    wanted, _ = by_transformers(made.model, given, 8)
    pixels = given["pixel_values"].flatten(0, -4)
    reference = find_family(made.model.config.to_dict()).reference
    answer = reference_generate(
        made.model, None, given["input_ids"], pixels, 8, image_size=made.image_size, reference=reference
    )
    assert answer.token_ids == wanted


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_equals_the_torch_reference(bundle: Callable[[str], Made], name: str) -> None:
    """The export's own check ran; here is what it found, and that every picture can be answered."""
    check_answers_of_any_size(bundle(name), WORDS)


@pytest.mark.parametrize(
    "name",
    [
        NAMES[name]
        for name, (_, _, wishes) in BUNDLES.items()
        if wishes["method"] in ("none", "vispruner", "divprune", "visionzip", "cdpruner")
        and "target" not in wishes
        and name != "idefics3-odd-none"  # two of its pictures, of 169 tokens each, outgrow its cache
    ],
)
def test_several_pictures(bundle: Callable[[str], Made], name: str) -> None:
    """Tiles of each, marks between them and around; against transformers and, pruned, against torch."""
    made = bundle(name)

    def processing(pictures: list[Image.Image], turns: Turns) -> Any:
        return processed(made, pictures, turns)

    check_answers(made.folder, made.model, processing, made.image_size, [asked(WORDS, 2), TALK])


@pytest.mark.parametrize(
    "name", ["idefics3-vispruner", pytest.param("internvl-vispruner", marks=pytest.mark.slow)]
)
def test_batches_of_several_pictures(bundle: Callable[[str], Made], name: str) -> None:
    made = bundle(name)
    check_batch(made.folder, made.image_size)


@pytest.mark.slow
@pytest.mark.trtrtx
@pytest.mark.skipif(MISSING, reason=f"tensorrt_rtx is not installed: {INSTALL[ENGINE]}")
@pytest.mark.parametrize("name", [name for name in BUNDLES if name.endswith("float16")])
def test_every_graph_builds_with_tensorrt(bundle: Callable[[str], Made], name: str) -> None:
    check_builds(bundle(name).folder, ENGINE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUNDLES if name.endswith("jetpack6")])
def test_jetpack6_writes_what_tensorrt_10_3_takes(bundle: Callable[[str], Made], name: str) -> None:
    paths = list(bundle(name).folder.glob("*.onnx"))
    assert [line for path in paths for line in refused(path)] == []


def test_decoders_of_internvl_3_5() -> None:
    """Its released sizes: dense Qwen3 as it is; mixtures of experts are refused with the reason."""
    InternVL.check(InternVLConfig(text_config=Qwen3Config()).to_dict())
    for text in (Qwen3MoeConfig(), GptOssConfig()):
        with pytest.raises(VtpError, match=f"decoder is '{text.model_type}', whose layers have experts"):
            InternVL.check(InternVLConfig(text_config=text).to_dict())


def test_tiles_form_no_grid_and_one_tile_does(folders: Callable[[str], Any]) -> None:
    folder, _ = folders("internvl")
    one, five = (load(folder, "float32", size).family for size in [(28, 28), (56, 56)])
    assert (one.views, one.grid, dict(one.lacks)) == (1, (2, 2), {})
    assert (five.views, five.grid) == (5, (1, 20)) and "several tiles" in five.lacks["grid"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "adaptprune"], "needs grid, .* its tokens lie in several tiles; nearest .* fastv"),
        (["--method", "vispruner", "--keep-tokens", "13"], "keep-tokens 13 exceeds the 12 visual tokens"),
        (["--image-size", "30x28"], "image size 30x28 is not made of whole tiles; give multiples of 28x28"),
    ],
)
def test_refused_in_one_line(
    folders: Callable[[str], Any], tmp_path: Path, capsys: Any, flags: list[str], message: str
) -> None:
    folder, _ = folders("internvl")
    argv = ["--model", str(folder), "-o", str(tmp_path / "out"), "--image-size", "56x28", *flags]
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [-1, -2]}, "only one layer, a whole number, is supported"),
        ({"vision_feature_select_strategy": "full"}, "only 'default', which leaves CLS out, is supported"),
        ({"text_config": {"model_type": "mamba"}}, "this model's decoder is 'mamba'"),
    ],
)
def test_configs_that_are_not_served(change: dict[str, Any], message: str) -> None:
    config = {"architectures": ["InternVLForConditionalGeneration"], **change}
    with pytest.raises(VtpError, match=message):
        find_family(config).check(config)


@pytest.mark.parametrize(
    ("name", "tiles", "tokens"),
    [
        ("idefics3-vispruner", [1, 5, 5], [4, 20, 20]),
        ("internvl-vispruner", [1, 3, 3], [4, 12, 12]),
        ("smolvlm-one-none", None, None),  # a batch of pictures
        ("idefics3-jetpack6", None, None),  # an engine is built for all of them
    ],
)
def test_tiles_go_through_the_encoder_in_any_number(
    bundle: Callable[[str], Made], name: str, tiles: list[int] | None, tokens: list[int] | None
) -> None:
    """Each gives what it gives among all, so that a server may do something else between two of them."""
    folder = bundle(name).folder
    graph = open_bundle(folder).manifest.graphs["vision_encoder.onnx"]
    axes = {} if tiles is None else {"tiles": tiles, "tile_tokens": tokens}
    assert {name: sizes for name, sizes in graph.axes.items() if name.startswith("tile")} == axes
    if tiles is None:
        return
    with Pipeline.load(folder, "ort-cpu", threads=1) as pipe, pipe.claimed() as runner:
        encoder = runner.stages("image", pipe.keep_counts[0])[0]
        pixels = np.random.default_rng(0).normal(size=(tiles[1], 3, 28, 28)).astype(np.float32)
        whole = encoder.engine.run({"pixel_values": encoder.engine.put(pixels)})
        parts = [encoder.engine.run({"pixel_values": encoder.engine.put(one[None])}) for one in pixels]
    for name in graph.outputs:
        joined = np.concatenate([part[name].numpy() for part in parts], axis=1)
        np.testing.assert_allclose(joined, whole[name].numpy(), rtol=1e-5, atol=1e-6)
