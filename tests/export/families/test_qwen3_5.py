"""Qwen3.5: linear attention beside full attention, on ONNX Runtime's operator, against transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vtp.engines import UsageError, VtpError
from vtp.export.cli import main
from vtp.export.families import find_family
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.preprocess import preprocess

from ...models.tiny_qwen import IMAGE, processed, save_qwen, transformers_answer
from ...once import Once
from ...oracles.joining_rows import check_slots
from ...oracles.several_pictures import TALK, WORDS, asked, check_answers, check_batch
from .compared import Made, bundles_of, check_answers_of_any_size, check_tower, follow, marked, noise

SIZE, COUNT = (32, 48), 24
MODELS: dict[str, dict[str, Any]] = {
    "short": {"layers": 2, "depth": 1},
    "deep": {"layers": 5, "seed": 1, "tied": True},
}
# Bundle: model, wishes. In "short" layer 1 attends, in "deep" layers 1 and 3.
BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    "short-fastervlm": ("short", {"method": "fastervlm", "keep_tokens": f"5,{COUNT}"}),
    "deep-vispruner": ("deep", {"method": "vispruner", "keep_tokens": "6"}),
    "deep-none": ("deep", {"method": "none"}),
    "deep-fastv": ("deep", {"method": "fastv", "keep_tokens": "6"}),
    "deep-divprune": ("deep", {"method": "divprune", "keep_tokens": "7"}),
    "deep-cdpruner": ("deep", {"method": "cdpruner", "keep_tokens": "7"}),
    "deep-visionzip": ("deep", {"method": "visionzip", "keep_tokens": "7"}),
    "deep-half": ("deep", {"method": "fastv", "keep_tokens": "6", "dtype": "float16"}),
}
QUICK = "short-fastervlm"
NAMES = marked(BUNDLES, [QUICK])
BEFORE, AFTER = [11, 20, 30, 3], [4, 40, 50, 60, 70]


@pytest.fixture(scope="module")
def folders(saved: Callable[..., Any]) -> Callable[[str], tuple[Path, Any]]:
    """Folder and model by name; written at the first call."""
    return lambda name: saved(save_qwen, "qwen3_5", **MODELS[name])


@pytest.fixture(scope="module")
def bundle(once: Once, folders: Callable[[str], Any]) -> Callable[[str], Made]:
    return bundles_of(BUNDLES, once, folders, max_length=256, image_size=SIZE)


@pytest.mark.parametrize("name", [NAMES[QUICK], NAMES["deep-none"]])
def test_all_tokens_say_what_transformers_says(bundle: Callable[[str], Made], name: str) -> None:
    """From the picture on: a prompt of more tokens than transformers takes at a time, 24 greedy ones."""
    made, picture, before = bundle(name), noise(*SIZE, seed=3), [*BEFORE, *range(40, 90)]
    with torch.no_grad():
        answer = transformers_answer(made.model, picture, before, AFTER, 24)
    pixels = preprocess(picture, open_bundle(made.folder).manifest.image)
    tokens, _ = follow(made.folder, pixels, [*before, IMAGE, *AFTER], len(before), answer.logits)
    assert tokens == answer.sequences[0, -24:].tolist()
    ids = torch.tensor([[*before, *[IMAGE] * COUNT, *AFTER]])
    reference = find_family(made.model.config.to_dict()).reference
    given = torch.from_numpy(pixels)
    alone = reference_generate(made.model, None, ids, given, 24, image_size=SIZE, reference=reference)
    assert alone.token_ids == tokens
    kinds = made.model.config.text_config.layer_types
    assert [bool(length) for length in alone.cache_lengths] == [kind == "full_attention" for kind in kinds]


@pytest.mark.parametrize("name", [NAMES[name] for name in BUNDLES if not name.endswith("none")])
def test_pruned_equals_the_torch_reference(bundle: Callable[[str], Made], name: str) -> None:
    """The export's own check ran; here is what it found, and that every picture can be answered."""
    made = bundle(name)
    manifest = check_answers_of_any_size(made, "what is it ?", COUNT)
    text = made.model.config.text_config
    layers = [number for number, kind in enumerate(text.layer_types) if kind == "linear_attention"]
    for kind, shape, dtype in (
        ("conv", [80, text.linear_conv_kernel_dim], manifest.dtype),
        ("recurrent", [4, 8, 12], "float32"),
    ):
        states = [one for graph in manifest.graphs.values() for one in graph.states if one.name == kind]
        assert sorted(layer for state in states for layer in state.layers) == layers
        assert all(state.shape == shape and state.dtype == dtype for state in states)


def test_the_tower_is_transformers(folders: Callable[[str], Any]) -> None:
    """Features and cues of the graph's module against hooks in an unmodified model."""
    check_tower(*folders("short"), SIZE)


def test_a_batch_says_what_each_says_alone(bundle: Callable[[str], Made]) -> None:
    """Rows of unequal length: padding must neither decay a state nor be written into it."""
    check_batch(bundle(QUICK).folder, SIZE)


def test_slots_join_and_leave(bundle: Callable[[str], Made]) -> None:
    check_slots(bundle(QUICK).folder, "ort-cpu", SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [QUICK, "deep-none"])
def test_several_pictures(bundle: Callable[[str], Made], name: str) -> None:
    made = bundle(name)
    check_answers(made.folder, made.model, processed, SIZE, [asked(WORDS[0], 2), TALK])


def test_other_engines_and_prefixes_are_refused(bundle: Callable[[str], Made]) -> None:
    folder = bundle(QUICK).folder
    with pytest.raises(
        UsageError, match=r"family qwen3_5\): its decoder has layers with a state, which cannot"
    ):
        Pipeline.load(folder, prefix_caching=True)
    pytest.importorskip("openvino")
    with pytest.raises(VtpError, match=r"decoder\.onnx.*LinearAttention"):
        Pipeline.load(folder, "openvino-cpu")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "adaptprune"], "by keys of layer 2, which has no attention .*layers 1, 3 have"),
        (
            ["--method", "none", "--target", "tensorrt"],
            "target tensorrt has no operator for linear attention, which layers 0, 2, 4 of this decoder are",
        ),
        (
            ["--method", "none", "--target", "jetpack6"],
            "target jetpack6 has no operator for linear attention",
        ),
    ],
)
def test_refused_in_one_line(
    folders: Callable[[str], Any], tmp_path: Path, capsys: Any, flags: list[str], message: str
) -> None:
    folder, _ = folders("deep")
    argv = ["--model", str(folder), "-o", str(tmp_path / "out"), "--image-size", "48x32", *flags]
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
