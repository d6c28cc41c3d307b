"""Qwen-VL models: towers, positions along three axes, and bundles against transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch

from vtp.engines import UsageError, VtpError
from vtp.engines.tensorrt.library import INSTALL, build_engine, refused_nodes
from vtp.export.checkpoint import loading as checkpoint
from vtp.export.cli import main
from vtp.export.exporter import Request, export
from vtp.export.pruners import find_method
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands.build import profile_of
from vtp.runtime.parity_gate import cases
from vtp.runtime.preprocess import preprocess

from ...models.tiny_qwen import (
    CHAT_TEMPLATE,
    IMAGE,
    KINDS,
    MERGE,
    PATCH,
    image_processor,
    processed,
    qwen_tokenizer,
    save_qwen,
    transformers_answer,
)
from ...once import Once
from ...oracles.several_pictures import TALK, WORDS, asked, check_answers, check_batch
from .compared import Made, bundles_of, check_answers_of_any_size, check_tower, follow, marked, noise

# (height, width): 4 x 6 merged tokens, and 5 x 3.
SIZES = {"wide": (32, 48), "tall": (40, 24)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "2": ("qwen2_vl", {}),
    "2-tied": ("qwen2_vl", {"tied": True, "seed": 1, "layers": 4}),
    "2.5": ("qwen2_5_vl", {"seed": 2, "tied": True}),
    "2.5-windows": ("qwen2_5_vl", {"seed": 3, "fullatt_block_indexes": [0]}),
    "3": ("qwen3_vl", {"seed": 4, "layers": 4, "depth": 4}),
}
BUNDLES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "2-none": ("2", "wide", {"method": "none"}),
    "2-tied-none": ("2-tied", "tall", {"method": "none"}),
    "2-vispruner": ("2", "wide", {"method": "vispruner", "keep_tokens": "6,12"}),
    "2-divprune": ("2", "tall", {"method": "divprune", "keep_tokens": "7"}),
    "2-fastv": ("2", "wide", {"method": "fastv", "keep_tokens": "9"}),
    "2-adaptprune": ("2", "wide", {"method": "adaptprune", "keep_tokens": "9"}),
    "2-visionzip": ("2", "wide", {"method": "visionzip", "keep_tokens": "9"}),
    "2-cdpruner": ("2", "wide", {"method": "cdpruner", "keep_tokens": "9"}),
    "2-sparsevlm": ("2-tied", "wide", {"method": "sparsevlm", "keep_tokens": "9"}),
    "2.5-none": ("2.5", "wide", {"method": "none"}),
    "2.5-tall-none": ("2.5", "tall", {"method": "none"}),
    "2.5-vispruner": ("2.5", "tall", {"method": "vispruner", "keep_tokens": "6"}),
    "2.5-divprune": ("2.5", "wide", {"method": "divprune", "keep_tokens": "7"}),
    "2.5-fastv": ("2.5-windows", "tall", {"method": "fastv", "keep_tokens": "9"}),
    "2.5-half": ("2.5", "tall", {"method": "adaptprune", "keep_tokens": "9", "dtype": "float16"}),
    "3-none": ("3", "wide", {"method": "none"}),
    "3-tall-none": ("3", "tall", {"method": "none"}),
    "3-vispruner": ("3", "wide", {"method": "vispruner", "keep_tokens": "6,12"}),
    "3-divprune": ("3", "tall", {"method": "divprune", "keep_tokens": "7"}),
    "3-cdpruner": ("3", "wide", {"method": "cdpruner", "keep_tokens": "9"}),
    "3-fastv": ("3", "tall", {"method": "fastv", "keep_tokens": "9"}),
    "3-adaptprune": ("3", "wide", {"method": "adaptprune", "keep_tokens": "9"}),
    "3-visionzip": ("3", "wide", {"method": "visionzip", "keep_tokens": "9"}),
    "3-sparsevlm": ("3", "wide", {"method": "sparsevlm", "keep_tokens": "9"}),
    "3-half": ("3", "wide", {"method": "fastv", "keep_tokens": "9", "dtype": "float16"}),
    "2-half": ("2", "wide", {"method": "vispruner", "keep_tokens": "9", "dtype": "float16"}),
}
QUICK = {"2-none", "2-fastv", "2.5-vispruner", "3-none", "3-fastv"}
NAMES = marked(BUNDLES, QUICK)
UNPRUNED = [item for name, item in NAMES.items() if name.endswith("none")]
PRUNED = [item for name, item in NAMES.items() if not name.endswith("none")]
BEFORE, AFTER = [11, 20, 30, 3], [4, 40, 50, 60, 70]


@pytest.fixture(scope="module")
def folders(saved: Callable[..., Any]) -> Callable[[str], tuple[Path, Any]]:
    """Folder and model by name; written at the first call."""

    def get(name: str) -> tuple[Path, Any]:
        kind, options = MODELS[name]
        return saved(save_qwen, kind, **options)

    return get


@pytest.fixture(scope="module")
def bundle(once: Once, folders: Callable[[str], Any]) -> Callable[[str], Made]:
    table = {name: (kind, {"image_size": SIZES[size], **own}) for name, (kind, size, own) in BUNDLES.items()}
    return bundles_of(table, once, folders, max_length=256)


# -- the tower -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_the_tower_is_transformers(folders: Callable[[str], Any], name: str, size: str) -> None:
    """Features and cues of the graph's module against hooks in an unmodified model."""
    tokens, wanted, family = check_tower(*folders(name), SIZES[size])
    assert tokens.shape == (1, family.grid[0] * family.grid[1], family.decoder.wide(0))
    assert float(wanted["attention_scores"].sum()) == pytest.approx(1 / MERGE**2, abs=1e-4)


# -- generation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNPRUNED)
def test_unpruned_equals_transformers(bundle: Callable[[str], Made], name: str) -> None:
    """From the picture on: preprocessing, tower, positions, decoder; 24 greedy tokens and their logits."""
    made = bundle(name)
    picture = noise(*made.image_size, seed=3)
    with torch.no_grad():
        answer = transformers_answer(made.model, picture, BEFORE, AFTER, 24)
    pixels = preprocess(picture, open_bundle(made.folder).manifest.image)
    tokens, _ = follow(made.folder, pixels, [*BEFORE, IMAGE, *AFTER], len(BEFORE), answer.logits)
    assert tokens == answer.sequences[0, -24:].tolist()


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_equals_the_torch_reference(bundle: Callable[[str], Made], name: str) -> None:
    """The export's own check ran; here is what it found, and that every picture can be answered."""
    check_answers_of_any_size(bundle(name), "what is it ?")


@pytest.mark.parametrize("name", sorted(name for name in QUICK if not name.endswith("none")))
def test_the_reference_chooses_alike(bundle: Callable[[str], Made], name: str) -> None:
    """With cues of its own making, from an unmodified model."""
    made, (model, _, wishes) = bundle(name), BUNDLES[name]
    with Pipeline.load(made.folder) as pipe:
        image, keep = pipe.manifest.image, pipe.manifest.visual.keep[0]
        grid = (pipe.manifest.visual.grid[0], pipe.manifest.visual.grid[1])
        result = pipe.generate(noise(*made.image_size), "what is it ?", max_new_tokens=8, keep_tokens=keep)
        prompt = pipe._prompter.encode(pipe._prompter.messages_for("what is it ?"))
    ids = [*prompt.ids[: prompt.image_start], *[IMAGE] * (grid[0] * grid[1])]
    pruner = find_method(wishes["method"])(grid, keep)
    reference = checkpoint.find_family({"architectures": [KINDS[MODELS[model][0]][1]]}).reference
    answer = reference_generate(
        made.model,
        pruner,
        torch.tensor([[*ids, *prompt.ids[prompt.image_start + 1 :]]]),
        torch.from_numpy(preprocess(noise(*made.image_size), image)),
        max_new_tokens=8,
        positions="original",
        image_size=made.image_size,
        reference=reference,
    )
    assert result.kept == answer.keep_indices.tolist()
    assert result.token_ids == answer.token_ids[: len(result.token_ids)]


def test_the_whole_way_equals_transformers_prompt(bundle: Callable[[str], Made]) -> None:
    """Picture and words in, tokens out: the template's text with transformers' placeholders."""
    made = bundle("2-none")
    tokenizer, words = qwen_tokenizer(), "what shape is the red ?"
    content = [{"type": "image"}, {"type": "text", "text": words}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=CHAT_TEMPLATE,
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = tokenizer(text)["input_ids"]
    place = ids.index(IMAGE)
    picture = noise(*made.image_size, seed=5)
    with torch.no_grad():
        answer = transformers_answer(made.model, picture, ids[:place], ids[place + 1 :], 16)
    wanted = answer.sequences[0, -16:].tolist()
    with Pipeline.load(made.folder) as pipe:
        result = pipe.generate(picture, words, max_new_tokens=16)
    assert result.token_ids == wanted[: len(result.token_ids)]
    assert len(result.token_ids) == 16 or result.finish_reason == "eos"
    assert result.prompt_tokens == len(ids) - 1


SEVERAL = {"2-none", "2.5-vispruner", "3-none"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in SEVERAL else pytest.param(name, marks=pytest.mark.slow)
        for name, (_, _, wishes) in BUNDLES.items()
        if wishes["method"] not in ("fastv", "adaptprune", "sparsevlm") and "dtype" not in wishes
    ],
)
def test_several_pictures(bundle: Callable[[str], Made], name: str) -> None:
    """Against transformers and, pruned, against torch: positions, windows and streams of each picture."""
    made, talks = bundle(name), [asked(WORDS[0], 2), TALK]
    check_answers(made.folder, made.model, processed, made.image_size, talks)


@pytest.mark.parametrize("name", ["2.5-vispruner", pytest.param("3-cdpruner", marks=pytest.mark.slow)])
def test_batches_of_several_pictures(bundle: Callable[[str], Made], name: str) -> None:
    made = bundle(name)
    check_batch(made.folder, made.image_size)


def test_the_gate_walks_positions_of_three_axes(bundle: Callable[[str], Made]) -> None:
    """What built engines are compared on: the prompt, and the step after it."""
    opened = open_bundle(bundle("2-none").folder)
    prompt, step = [case for case in cases(opened) if case.file == "decoder.onnx"]
    total = prompt.feeds["inputs_embeds"].shape[1]
    assert prompt.feeds["position_ids"].shape == (1, total, 3)
    assert step.feeds["position_ids"].tolist() == [[[prompt.feeds["position_ids"].max() + 1] * 3]]


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-size", "50x32"], "50x32 is not made of whole merged patches; give multiples of 8"),
        (["--image-size", "160x160"], "25600 pixels; this processor takes 64 to 16384"),
        (["--method", "divprune", "--method-option", "positions=compact"], "qwen2_vl serves original"),
        (["--method", "divprune", "--keep-tokens", "25"], "25 exceeds the 24 visual tokens"),
    ],
)
def test_refused_in_one_line(
    folders: Callable[[str], Any], tmp_path: Path, capsys: Any, flags: list[str], message: str
) -> None:
    folder, _ = folders("2")
    argv = ["--model", str(folder), "-o", str(tmp_path / "out"), "--image-size", "48x32", *flags]
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error


def test_videos_and_other_counts_of_pictures_are_refused(bundle: Callable[[str], Made]) -> None:
    with Pipeline.load(bundle("2-none").folder) as pipe:
        for kind, message in (("video", "type 'video'; choose text or image"), ("image", "hold 2 images")):
            content = [{"type": "image"}, {"type": kind}, {"type": "text", "text": "what ?"}]
            with pytest.raises(UsageError, match=message):
                pipe.generate(noise(32, 48), messages=[{"role": "user", "content": content}])
        with pytest.raises(UsageError, match=r"holds '<\|video_pad\|>', a control token"):
            pipe.generate(noise(32, 48), "what is <|video_pad|> ?")
        with pytest.raises(UsageError, match="the messages hold 3 images, and 2 pictures are given"):
            pipe.generate([noise(32, 48)] * 2, messages=TALK)


def test_a_decoder_site_takes_one_picture(bundle: Callable[[str], Made]) -> None:
    refused = pytest.raises(UsageError, match="method fastv chooses inside the decoder and takes one picture")
    with Pipeline.load(bundle("3-fastv").folder) as pipe, refused:
        pipe.generate([noise(32, 48)] * 2, "which ?")


@pytest.mark.parametrize(("key", "own"), [("patch_size", PATCH), ("merge_size", MERGE)])
def test_a_processor_of_other_patches_is_refused(
    folders: Callable[[str], Any], tmp_path: Path, key: str, own: int
) -> None:
    folder, _ = folders("2")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    path = other / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: 2 * own}))
    with pytest.raises(VtpError, match=f"{key} is {2 * own}, the vision tower's {own}; fix"):
        export(Request(tmp_path / "out", model=str(other), method="none", image_size=(32, 48)))


def test_the_processor_says_the_grid(folders: Callable[[str], Any]) -> None:
    """The tests' sizes are what transformers makes of such pictures."""
    for height, width in SIZES.values():
        grid = image_processor()(noise(height, width), return_tensors="pt")["image_grid_thw"]
        assert grid.tolist() == [[1, height // PATCH, width // PATCH]]


# -- TensorRT ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.trtrtx
@pytest.mark.skipif(
    util.find_spec("tensorrt_rtx") is None, reason=f"tensorrt_rtx is not installed: {INSTALL['tensorrt-rtx']}"
)
@pytest.mark.parametrize(
    ("kind", "method", "target", "tower"),
    [
        ("qwen2_vl", "vispruner", "jetpack6", {"embed_dim": 64}),
        ("qwen2_5_vl", "vispruner", "tensorrt", {"hidden_size": 64, "fullatt_block_indexes": [0]}),
        ("qwen3_vl", "adaptprune", "tensorrt", {"hidden_size": 64, "depth": 3}),
    ],
)
def test_every_graph_builds_with_tensorrt(
    tmp_path: Path, kind: str, method: str, target: str, tower: dict[str, Any]
) -> None:
    """Heads 16 wide, which its attention operator takes; windows of unlike sizes, in the last block too."""
    save_qwen(tmp_path / "model", kind, **tower)
    bundle = export(
        Request(
            tmp_path / "bundle",
            model=str(tmp_path / "model"),
            method=method,
            keep_tokens="6",
            target=target,
            max_length=256,
            image_size=SIZES["tall"],
        )
    )
    assert bundle.manifest.parity["mode"] == "full"
    for file, graph in bundle.manifest.graphs.items():
        path = bundle.path(file)
        assert refused_nodes(path, "tensorrt-rtx") == []
        assert build_engine(path, "tensorrt-rtx", profile_of(graph)).plan.nbytes, file
