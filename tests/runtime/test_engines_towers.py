"""Bundles with a reduced vision tower on OpenVINO: every stage, kept tokens and answers are ONNX Runtime's.

A reduction chooses rows inside the tower. In float32 no choice of these bundles is close enough for another
library's rounding. In float16 and int8 some are: a row that one engine keeps and the other builds again is
another row. So in int8 the engines are held together by how many rows and kept tokens they share.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.bench.engines import limits_for
from vtp.calib.data import Sample
from vtp.calib.quantize.quantizer import Quantizer, Wish
from vtp.engines import Engine
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.compare import LIMITS, compare
from vtp.runtime.engine_choice import choose_engines
from vtp.runtime.opening import open_stage
from vtp.runtime.parity_gate import OVERLAP, _answer, cases
from vtp.runtime.preprocess import preprocess
from vtp.scenes import model_dir
from vtp.scenes.exam import by_picture, held_out

from ..models.tiny import save_tiny
from ..models.tiny_split import save_internvl
from ..once import Once

pytest.importorskip("openvino", reason="openvino is not installed")

ORT, OPENVINO = "ort-cpu", "openvino-cpu"
SIDE = 84  # 36 patches
_NOISE = np.random.default_rng(5).integers(0, 256, (2, 70, 90, 3), dtype=np.uint8)
# Noise, one colour (its patches differ by their positions alone), and two halves of one colour each.
PICTURES = [
    *map(Image.fromarray, _NOISE),
    Image.new("RGB", (SIDE, SIDE)),
    Image.fromarray(np.array([[[0, 0, 0], [250, 200, 30]]], np.uint8).repeat(SIDE, 0).repeat(SIDE // 2, 1)),
]
PROMPTS = ["what shape is it ?", "where ?", "how many ?", "what color is the left half ?"]
MODELS: dict[str, Callable[[Path], Any]] = {
    "clip": lambda path: save_tiny(path, layers=3, vision_layers=5, image_size=SIDE),
    "siglip": lambda path: save_tiny(path, layers=3, vision_layers=5, image_size=SIDE, vision="siglip"),
    "internvl": lambda path: save_internvl(path, vision_layers=4),
}
IPCV = {"tower": "ipcv:0.35", "tower_options": ["cut=2", "stable=1"]}
# Model, and the request. Methods read attention or keys of the last block, or nothing of the tower.
BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    "ipcv": ("clip", {**IPCV, "method": "fastervlm"}),
    "ipcv-siglip": ("siglip", {**IPCV, "method": "prumerge"}),
    "ipcv-tiles": ("internvl", {**IPCV, "method": "fastervlm", "image_size": (56, 56)}),
    "ipcv-jetpack6": ("siglip", {**IPCV, "method": "fastervlm", "target": "jetpack6", "dtype": "float32"}),
    "tome": ("clip", {"tower": "tome:4", "method": "prumerge"}),
    "tome-tiles": ("internvl", {"tower": "tome:1", "method": "divprune", "image_size": (56, 56)}),
    "tome-siglip": ("siglip", {"tower": "tome:3", "method": "fastervlm", "then": "fastv:1"}),
}
ALWAYS = ("ipcv",)  # by default; the other cases in the long tail
# Tiles of one colour are equal: among them the largest distance is rounding's, on either engine.
TIES = {("tome-tiles", 2)}  # bundle, and the picture


@pytest.fixture
def bundle(once: Once) -> Callable[[str], Bundle]:
    def get(name: str) -> Bundle:
        model, wishes = BUNDLES[name]
        folder = once.folder(f"towers-{model}", MODELS[model])
        asked = {"keep_tokens": "6", "max_length": 160, "verify": "none", **wishes}
        return open_bundle(once.bundle(folder, **asked))

    return get


def differences(bundle: Bundle, picture: Image.Image) -> list[str]:
    """What OpenVINO gives otherwise than ONNX Runtime, of every graph that it runs, on the same inputs."""
    found = []
    moved = choose_engines(bundle, OPENVINO).elsewhere  # graphs that compute in float64
    for case in cases(bundle, picture):
        if case.file in moved:
            continue
        engine = open_stage(bundle, case.file, OPENVINO, 1)
        given = _answer(engine, case)
        engine.close()
        for name, wanted in case.outputs.items():
            mine = given[name]
            if name.startswith("present."):  # beyond its length a cache holds anything
                mine, wanted = mine[..., : case.length, :], wanted[..., : case.length, :]
            result = compare(mine, wanted, limits_for(bundle))
            same = np.array_equal(mine, wanted) if wanted.dtype.kind == "i" else result.ok
            found += [] if same else [f"{case.file} at {case.when}, {name}: {result.why}"]
    return found


def answers(folder: Path, engine: str, name: str) -> list[tuple[Any, ...]]:
    """Every picture alone, then two as a batch; without those whose choice is a tie."""
    pairs = [(PICTURES[at], PROMPTS[at]) for at in range(len(PICTURES)) if (name, at) not in TIES]
    with Pipeline.load(folder, engine, threads=1) as pipe:
        found = [pipe.generate(picture, prompt, max_new_tokens=12) for picture, prompt in pairs]
        found += pipe.generate_batch(*(list(one) for one in zip(*pairs[1:3], strict=True)), max_new_tokens=12)
    return [(one.token_ids, one.kept, one.tower, one.then) for one in found]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in BUNDLES]
)
def test_every_stage_and_every_answer_is_onnx_runtimes(bundle: Callable[[str], Bundle], name: str) -> None:
    made = bundle(name)
    assert made.manifest.tower is not None
    assert differences(made, PICTURES[3]) == []
    assert answers(made.folder, OPENVINO, name) == answers(made.folder, ORT, name)


# -- int8 ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    """Eight held-out pictures of the built-in model."""
    return [items[0].image for items in by_picture(held_out(40))][:8]


@pytest.fixture(scope="module")
def scene_files(tmp_path_factory: pytest.TempPathFactory, scenes: list[Image.Image]) -> list[Sample]:
    """Four of them, to calibrate on."""
    folder = tmp_path_factory.mktemp("scenes")
    samples = [Sample(folder / f"{number}.png", "what is it ?") for number in range(4)]
    for sample, picture in zip(samples, scenes, strict=False):
        picture.save(sample.image)
    return samples


def rows_apart(mine: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How far each row of mine [N,C] is from the one wanted, as a share of its length, float64 [N]."""
    difference = np.linalg.norm(mine.astype(np.float64) - wanted, axis=-1)
    return np.asarray(difference / np.linalg.norm(wanted.astype(np.float64), axis=-1))


def encoded(engine: Engine, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """What an encoder gives of one picture's pixels [1,3,H,W]."""
    given = engine.run({"pixel_values": engine.put(pixels)})
    return {name: value.numpy()[0] for name, value in given.items()}


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["none", "ipcv:0.35", "tome:16", "downsample:224"])
def test_int8_encoders_differ_by_close_calls_alone(
    once: Once, tmp_path: Path, scenes: list[Image.Image], scene_files: list[Sample], tower: str
) -> None:
    """On the built-in model: the two engines are nearer to one another than int8 is to float32.

    Without a reduction, and with a smaller picture, every row is within the limits of two libraries in int8.
    With one that chooses rows a few are not, which the other engine merged, or built again.
    """
    options = ["cut=2", "stable=2"] if tower.startswith("ipcv") else []
    wishes = {"tower": tower, "tower_options": options, "verify": "none", "keep_tokens": "64"}
    source = open_bundle(once.bundle(model_dir(), method="fastervlm", **wishes))
    quantizer = Quantizer(source, Wish("int8", "none"))
    quantizer.observe(tmp_path / "probe", scene_files, ORT, 1, lambda _: None)
    (tmp_path / "small").mkdir()
    quantizer.write(tmp_path / "small", set())
    small = open_bundle(tmp_path / "small")
    runs = {"float32": (source, ORT), "int8": (small, ORT), "openvino": (small, OPENVINO)}
    engines = {name: open_stage(made, "vision_encoder.onnx", on, 1) for name, (made, on) in runs.items()}
    apart: dict[str, list[np.ndarray]] = {"float32": [], "openvino": []}
    shared: list[float] = []
    for picture in scenes:
        pixels = preprocess(picture, source.manifest.image).astype(np.float32)
        found = {name: encoded(engine, pixels) for name, engine in engines.items()}
        kept = {
            name: set(np.argsort(-given["attention_scores"], kind="stable")[:64].tolist())
            for name, given in found.items()
        }
        shared.append(len(kept["int8"] & kept["openvino"]) / 64)
        for name, rows in apart.items():
            rows.append(rows_apart(found[name]["image_features"], found["int8"]["image_features"]))
    limit, chooses = LIMITS["int4"].relative, tower.startswith(("ipcv", "tome"))
    beyond = {name: float(np.mean([rows > limit for rows in each])) for name, each in apart.items()}
    assert float(np.median(apart["openvino"])) < float(np.median(apart["float32"])) < limit
    assert beyond["openvino"] <= (beyond["float32"] if chooses else 0.0)
    assert min(shared) >= OVERLAP
