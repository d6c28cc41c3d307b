"""vtp-calib quantize on bundles of every family and target: the bits it says, and answers like float's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from vtp.calib import cli
from vtp.engines import open_graph
from vtp.export.exporter import Request, export
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.media.images import load_image
from vtp.runtime.preprocess import preprocess

from ..export.families import test_qwen
from ..models.tiny import save_tiny
from ..models.tiny_families import save_anyres
from ..models.tiny_gemma import save_gemma, tiny_gemma3, tiny_paligemma
from ..models.tiny_gemma4 import save_gemma4
from ..models.tiny_lfm2 import save_lfm2
from ..models.tiny_pixtral import save_mistral3
from ..models.tiny_qwen import save_qwen
from ..models.tiny_split import save_idefics3, save_internvl
from ..models.tiny_video import clip, save_video_llava
from ..once import Once
from ..oracles.tensorrt_10_3 import refused

Save = Callable[[Path], Any]
MODELS: dict[str, tuple[Save, tuple[int, int] | None]] = {
    "llava": (lambda path: save_tiny(path, layers=3), None),
    "next": (lambda path: save_anyres(path, "llava_next"), (56, 56)),
    "onevision": (
        lambda path: save_anyres(path, "llava_onevision", decoder="qwen2", vision="siglip"),
        (56, 56),
    ),
    "qwen2": (lambda path: save_qwen(path, "qwen2_vl"), (32, 48)),
    "qwen2.5": (lambda path: save_qwen(path, "qwen2_5_vl", seed=2, tied=True), (32, 48)),
    "qwen3": (lambda path: save_qwen(path, "qwen3_vl", seed=4, layers=4, depth=4), (32, 48)),
    "qwen3.5": (lambda path: save_qwen(path, "qwen3_5", seed=5, layers=4), (32, 48)),
    "lfm2": (save_lfm2, (32, 48)),
    "lfm2-tiles": (save_lfm2, (44, 88)),
    "internvl": (lambda path: save_internvl(path), (56, 28)),
    "smolvlm": (lambda path: save_idefics3(path, kind="smolvlm", tied=True, seed=7), (56, 28)),
    "gemma3": (lambda path: save_gemma(path, tiny_gemma3(seed=3)), None),
    "paligemma": (lambda path: save_gemma(path, tiny_paligemma()), None),
    "gemma4": (lambda path: save_gemma4(path), None),
    "mistral3": (lambda path: save_mistral3(path, "ministral3"), (32, 40)),
}
# Model, method, keep-count, target.
CASES = [
    ("qwen2.5", "vispruner", "5", "ort"),
    ("internvl", "divprune", "5", "jetpack6"),
    *[
        (model, method, "3", target)
        for model in MODELS
        for method, target in (
            ("vispruner", "ort"),
            ("fastv", "ort"),
            ("fastv", "tensorrt"),
            ("fastv", "jetpack6"),
        )
        if model != "qwen3.5" or target == "ort"  # linear attention is ONNX Runtime's alone
    ],
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model; written at the first call."""
    root = tmp_path_factory.mktemp("families")

    def get(name: str) -> Path:
        if not (root / name).exists():
            MODELS[name][0](root / name)
        return root / name

    return get


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions without answers, about three pictures of unequal shape."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(3)
    with (folder / "d.jsonl").open("w") as out:
        for number, size in enumerate([(60, 80, 3), (90, 50, 3), (64, 64, 3)]):
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.png")
            out.write(json.dumps({"image": f"{number}.png", "prompt": "what is the red ?"}) + "\n")
    return folder / "d.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method", "keep", "target"), CASES)
def test_a_family_is_quantised(
    folder_of: Callable[[str], Path],
    data: Path,
    tmp_path: Path,
    capsys: Any,
    model: str,
    method: str,
    keep: str,
    target: str,
) -> None:
    wish = Request(
        tmp_path / "float",
        str(folder_of(model)),
        method,
        keep,
        target=target,
        dtype="float32",
        image_size=MODELS[model][1],
        max_length=256,
        verify="none",
    )
    quantise(export(wish).folder, target, int(keep), data, tmp_path, capsys)


def test_a_family_of_the_default_tests_is_quantised(
    once: Once, saved: Callable[..., Any], data: Path, tmp_path: Path, capsys: Any
) -> None:
    """Qwen2.5-VL, on a bundle of its own tests."""
    model, size, wishes = test_qwen.BUNDLES["2.5-vispruner"]
    kind, options = test_qwen.MODELS[model]
    more = {"image_size": test_qwen.SIZES[size], "max_length": 256, "verify": "full", **wishes}
    source = once.bundle(saved(save_qwen, kind, **options)[0], **more)
    quantise(source, "ort", int(wishes["keep_tokens"]), data, tmp_path, capsys)


def test_a_bundle_for_videos_is_quantised(
    once: Once, saved: Callable[..., Any], tmp_path: Path, capsys: Any
) -> None:
    """By the frames of videos, which calibrate it as they are asked about."""
    frames = [Image.fromarray(frame) for frame in clip(5)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    lines = [json.dumps({"image": "clip.gif", "prompt": f"what is {word} ?"}) for word in ("it", "he")]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    wishes = {"max_length": 160, "frames": 3, "verify": "full", "keep_tokens": "6"}  # as test_video_llava's
    source = once.bundle(saved(save_video_llava)[0], method="vispruner", **wishes)
    given = ["quantize", source, "--data", tmp_path / "d.jsonl", "--prompt", "int8", "--force"]
    given += ["--max-new-tokens", 3, "--threads", 1, "--output", tmp_path / "small", "--out", tmp_path / "r"]
    assert cli.main([str(word) for word in given]) == 0, capsys.readouterr().err
    manifest = open_bundle(tmp_path / "small", check_hashes=True).manifest
    assert manifest.graphs["decoder_prompt.onnx"].cache_of == "decoder.onnx"
    told = manifest.quantization["layers"]
    assert len(told) > 20 and {one["to"] for one in told.values()} == {"int8", "int4"}
    with Pipeline.load(tmp_path / "small", "ort-cpu", threads=1) as pipe:
        said = pipe.generate(tmp_path / "clip.gif", "what ?", max_new_tokens=3)
    assert said.visual_tokens.after == 6 and said.token_ids


def quantise(source: Path, target: str, keep: int, data: Path, tmp_path: Path, capsys: Any) -> None:
    """Quantise a bundle by the command: its bits, its operators, its features and that it answers."""
    decoder = "none" if target == "jetpack6" else "int4"
    given = ["quantize", source, "--data", data, "--decoder", decoder, "--output", tmp_path / "small"]
    given += ["--force", "--samples", 2, "--max-new-tokens", 3, "--threads", 1, "--json"]
    capsys.readouterr()
    assert cli.main([str(word) for word in given]) == 0, capsys.readouterr().err
    record = json.loads(capsys.readouterr().out)["quantization"]
    assert {label.split("/")[0] for label in record["layers"]} >= {"vision_encoder"}
    assert ("int4" in {one["to"] for one in record["layers"].values()}) == (decoder == "int4")
    assert len(record["left_in_float"]) <= 0.3 * len(record["layers"]), record["left_in_float"]
    small = open_bundle(tmp_path / "small", check_hashes=True)
    for file in small.manifest.graphs:
        onnx.checker.check_model(str(small.path(file))) if target != "ort" else None
        if target == "jetpack6":
            assert not refused(small.path(file))
    near(source, small.folder, data.parent / "1.png")
    with Pipeline.load(small.folder, "ort-cpu", threads=1) as pipe:
        assert pipe.generate(data.parent / "0.png", "what ?", max_new_tokens=2).visual_tokens[1] == keep


def near(source: Path, small: Path, picture: Path) -> None:
    """Image features in int8 are those in float, with little noise."""
    file, name = "vision_encoder.onnx", "image_features"
    pixels = preprocess(load_image(picture), open_bundle(source).manifest.image)
    found = []
    for folder in (source, small):
        engine = open_graph(folder / file, "ort-cpu", 1)
        found.append(engine.run({"pixel_values": engine.put(pixels)})[name].numpy())
    assert 0 < np.square(found[0] - found[1]).mean() < 0.02 * np.square(found[0]).mean()
