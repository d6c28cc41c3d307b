"""InternVL, Idefics3 and SmolVLM against transformers: tiles, shuffled patches, marks in the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GptOssConfig, InternVLConfig, Qwen3Config, Qwen3MoeConfig

from vtp.engines import VtpError
from vtp.engines.tensorrt.library import INSTALL, build_engine, refused_nodes
from vtp.export.checkpoint.loading import load
from vtp.export.cli import main
from vtp.export.families import find_family
from vtp.export.families.tiled.internvl import InternVL
from vtp.export.verify.parity import STEPS
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands.build import profile_of
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import StageRunner

from ...models.tiny_split import idefics3_processor, internvl_processor, save_idefics3, save_internvl
from ...once import Once
from ...oracles.several_pictures import TALK, Turns, asked, check_answers, check_batch
from ...oracles.tensorrt_10_3 import refused

Size = tuple[int, int]  # (height, width)
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
NAMES = [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in BUNDLES]
UNPRUNED = [item for name, item in zip(BUNDLES, NAMES, strict=True) if name.endswith("none")]
PRUNED = [item for name, item in zip(BUNDLES, NAMES, strict=True) if not name.endswith("none")]
WORDS = "what shape is the red ?"


@dataclass(frozen=True)
class Made:
    """A bundle on disk, the model it came from, that model's processor, its image size."""

    folder: Path
    model: Any
    processor: Any
    image_size: Size


@pytest.fixture(scope="module")
def folders(saved: Callable[..., Any]) -> Callable[[str], tuple[Path, Any]]:
    """Folder and model by name; written at the first call."""

    def get(name: str) -> tuple[Path, Any]:
        save, _, options = MODELS[name]
        return saved(save, **options)

    return get


@pytest.fixture(scope="module")
def bundle(once: Once, folders: Callable[[str], Any]) -> Callable[[str], Made]:
    """A bundle by name, exported, and held against torch, at the first call."""

    def get(name: str) -> Made:
        model, size, wishes = BUNDLES[name]
        folder, torch_model = folders(model)
        made = once.bundle(folder, max_length=256, image_size=size, verify="full", **wishes)
        return Made(made, torch_model, MODELS[model][1](torch_model, size), size)

    return get


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def processed(made: Made, pictures: list[Image.Image], turns: Turns) -> Any:
    """transformers' own processing of pictures and a talk: tiles, chat template, marks, placeholders."""
    text = made.processor.apply_chat_template(turns, add_generation_prompt=True)
    more = not text.startswith("<s>")  # as `apply_chat_template(tokenize=True)` does it
    return made.processor(images=pictures, text=text, add_special_tokens=more, return_tensors="pt")


def transformers_answer(made: Made, given: Any, steps: int) -> Any:
    """transformers' own greedy generation."""
    made.model.generation_config.eos_token_id = None
    with torch.no_grad():
        return made.model.generate(
            **given,
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )


@pytest.mark.parametrize("name", UNPRUNED)
def test_unpruned_equals_transformers(bundle: Callable[[str], Made], name: str) -> None:
    """From picture and words on: preprocessing, prompt, tower, decoder; 24 greedy tokens, their logits."""
    made = bundle(name)
    picture = noise(*made.image_size, seed=3)
    given = processed(made, [picture], asked(WORDS, 1))
    answer = transformers_answer(made, given, 24)
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
    runner, tokens = StageRunner(opened, "ort-cpu", 1), list[int]()
    values = runner.prefill(count, pixels, prompt.ids, prompt.image_start, Timings())
    logits, position = values["logits"].numpy()[0, 0], int(values["next_position"].numpy()[0])
    assert position == len(wanted_ids)
    for wanted in answer.logits:
        assert np.abs(logits - wanted[0].numpy()).max() < 1e-3
        tokens.append(int(logits.argmax()))
        logits = runner.step(count, tokens[-1], position)
        position += 1
    runner.close()
    assert tokens == answer.sequences[0, -24:].tolist()


@pytest.mark.parametrize("name", UNPRUNED)
def test_the_reference_equals_transformers(bundle: Callable[[str], Made], name: str) -> None:
    """What pruned bundles are held against is the model itself where nothing is pruned."""
    made = bundle(name)
    given = processed(made, [noise(*made.image_size, seed=4)], asked(WORDS, 1))
    wanted = transformers_answer(made, given, 8).sequences[0, -8:].tolist()
    pixels = given["pixel_values"].flatten(0, -4)
    reference = find_family(made.model.config.to_dict()).reference
    answer = reference_generate(
        made.model, None, given["input_ids"], pixels, 8, image_size=made.image_size, reference=reference
    )
    assert answer.token_ids == wanted


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_equals_the_torch_reference(bundle: Callable[[str], Made], name: str) -> None:
    """The export's own check ran; here is what it found, and that every picture can be answered."""
    made = bundle(name)
    with Pipeline.load(made.folder) as pipe:
        visual = pipe.manifest.visual
        report = pipe.manifest.parity["generation"]
        assert all(found["tokens"] == STEPS for found in report.values()) and report
        for keep in visual.keep:
            for size in [made.image_size, (31, 90), (7, 5)]:
                result = pipe.generate(noise(*size), WORDS, max_new_tokens=4, keep_tokens=keep)
                assert (result.visual_tokens.before, result.visual_tokens.after) == (visual.count, keep)
                assert len(result.kept) == len(set(result.kept)) == keep
                assert result.kept == sorted(result.kept) and result.kept[-1] < visual.count


@pytest.mark.parametrize(
    "name",
    [
        name if name in SMALL else pytest.param(name, marks=pytest.mark.slow)
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
    opened = open_bundle(bundle(name).folder)
    for file, graph in opened.manifest.graphs.items():
        assert refused_nodes(opened.path(file), ENGINE) == []
        assert build_engine(opened.path(file), ENGINE, profile_of(graph)).plan.nbytes, file


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
