"""change: what it keeps of a camera's pictures, where the reference comes from, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.engines import UsageError
from vtp.export.exporter import Request, export
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.parity_gate import cases

from ...models.tiny_qwen import save_qwen
from ...models.tiny_video import save_video_llava

ASKED, SIDE, CELL = "what is it ?", 56, 14  # 4 x 4 patches
GREY = np.array([122, 116, 104])  # the mean of CLIP's preprocessing, which becomes 0


@pytest.fixture(scope="module")
def folder(exported: Callable[[str], Any]) -> Path:
    """A bundle that keeps 3 of 16."""
    return exported("change").folder


@pytest.fixture
def camera(folder: Path) -> Iterator[Pipeline]:
    with Pipeline.load(folder, engine="ort-cpu", threads=1, stream_reuse=True) as pipe:
        yield pipe


def scene(*bright: int, seed: int = 0) -> np.ndarray:
    """Noise uint8 [56,56,3] around grey, with some patches white."""
    picture = (GREY + np.random.default_rng(seed).integers(-9, 10, (SIDE, SIDE, 3))).astype(np.uint8)
    for place in bright:
        y, x = CELL * (place // 4), CELL * (place % 4)
        picture[y : y + CELL, x : x + CELL] = 255
    return picture


def kept(pipe: Pipeline, picture: np.ndarray, **more: Any) -> list[int]:
    result = pipe.generate(picture, ASKED, max_new_tokens=2, **more)
    assert (result.visual_tokens.before, result.visual_tokens.after) == (16, 3)
    return result.kept


def test_what_changed_since_the_picture_before(camera: Pipeline) -> None:
    """A bright patch shows when it comes and when it goes, not while it stands still."""
    assert set(kept(camera, scene(5, 6, 9))) == {5, 6, 9}  # of a first picture: what differs from grey
    moved = scene(5, 9, 10, 15)
    assert [kept(camera, moved) for _ in range(3)] == [
        [6, 10, 15]
    ] * 3  # the reference is that of the first time
    assert kept(camera, scene(1, 10, 15)) == [1, 5, 9]


def test_a_picture_by_itself_is_compared_with_grey(folder: Path, camera: Pipeline) -> None:
    """Without stream_reuse, in a batch, among several, after `forget`: no earlier picture is known."""
    with Pipeline.load(folder, engine="ort-cpu", threads=1) as plain:
        for place in (3, 12):
            assert set(kept(plain, scene(place, 7, 8))) == {place, 7, 8}
    kept(camera, scene(1, 2, 3))
    with camera.claimed() as runner:
        runner.images.forget()
    assert set(kept(camera, scene(1, 2, 4))) == {1, 2, 4}
    pair = camera.generate([scene(0, 7, 8), scene(3, 7, 8)], ASKED, max_new_tokens=2)
    assert [set(one) for one in pair.kept] == [{0, 7, 8}, {3, 7, 8}]
    both = camera.generate_batch([scene(0, 7, 8), scene(3, 7, 8)], [ASKED, ASKED], max_new_tokens=2)
    assert [set(one.kept) for one in both] == [{0, 7, 8}, {3, 7, 8}]


def test_the_parity_gate_gives_it_both_pictures(folder: Path) -> None:
    """What vtp-build compares before an engine is run."""
    feeds = {case.file: case.feeds for case in cases(open_bundle(folder))}["pruner.onnx"]
    assert {"picture", "reference_picture"} < set(feeds) and not feeds["reference_picture"].any()


@pytest.mark.parametrize("more", [{}, {"dtype": "float16"}, {"target": "jetpack6"}, {"tower": "stc:0.5"}])
def test_a_bundle_holds_against_torch(
    model_folder: Callable[[str], Path], tmp_path: Path, more: dict[str, str]
) -> None:
    wish = Request(tmp_path / "out", str(model_folder("gqa")), "change", "3", max_length=128, **more)
    manifest = export(wish).manifest
    assert manifest.method.positions == "original"
    assert manifest.parity["graphs"]["pruner"]["indices"] == "equal"
    assert manifest.parity["generation"]["3"]["equal"] == manifest.parity["generation"]["3"]["tokens"]


def test_features_alone_are_refused(camera: Pipeline) -> None:
    features = np.zeros((1, 16, 32), np.float32)
    with pytest.raises(UsageError, match="change compares pictures, so image_features alone is not enough"):
        camera.generate(image_features=features, prompt=ASKED)


@pytest.mark.parametrize(
    ("save", "wishes", "words"),
    [
        (
            lambda path: save_qwen(path, "qwen2_5_vl"),
            {},
            "pixel by pixel, and those of family qwen2_5_vl come",
        ),
        (
            save_video_llava,
            {"frames": 2},
            "pixel by pixel, and those of family video_llava come in as patches",
        ),
    ],
)
def test_other_pictures_are_refused(tmp_path: Path, save: Any, wishes: dict[str, Any], words: str) -> None:
    save(tmp_path / "model")
    with pytest.raises(UsageError, match=words) as refused:
        export(Request(tmp_path / "out", str(tmp_path / "model"), "change", "2", **wishes))
    assert "\n" not in str(refused.value) and "nearest methods that it serves: " in str(refused.value)
