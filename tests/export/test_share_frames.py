"""--share frame: K dealt to the frames of a video, and a method that chooses in each of them for itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.export.exporter import Request, export
from vtp.export.families.llava.llava_onevision import ClipReference as PooledReference
from vtp.export.families.llava.video_llava import ClipReference
from vtp.export.families.tiles import equal_tiles
from vtp.export.plan.share import Shared, dealt
from vtp.export.pruners import find_method
from vtp.runtime import NO_PICTURE, Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.bundle.manifest import FrameInfo
from vtp.runtime.commands.run import main as vtp_run
from vtp.runtime.generation.answer import kept_per_frame

from ..models.tiny_video import ONEVISION, clip, pixels_of, save_next_video, save_onevision, save_video_llava
from ..once import Once
from ..oracles.numpy_pruners_more import MARGINS, REFERENCES

FRAMES = 3
ASKED = "what is it ?"
SIDE = 3  # of a frame in the tests of the pruner alone


@pytest.fixture(scope="module")
def bundle(once: Once, saved: Callable[..., Any]) -> Callable[..., Path]:
    """A bundle of a tiny Video-LLaVA whose frames share K, held against torch when it is exported."""

    def get(save: Callable[..., Any] = save_video_llava, **wishes: Any) -> Path:
        asked = {"keep_tokens": "7", "max_length": 160, "frames": FRAMES, "share": "frame", **wishes}
        return once.bundle(saved(save)[0], **asked)

    return get


def busy(frames: int, which: int) -> np.ndarray:
    """A clip of which one frame shows noise, and the others one grey."""
    video = np.full((frames, 61, 90, 3), 128, np.uint8)
    video[which] = clip(1)[0]
    return video


@pytest.mark.parametrize(
    "name", ["vispruner", "hiprune", "focal", "divprune", "scope", "holov", "prunesid", "otprune"]
)
@pytest.mark.parametrize("keep", [4, 13, 35])
def test_a_method_chooses_as_its_loops_do_in_each_frame(name: str, keep: int) -> None:
    """Also those that measure distances in a grid: a frame is one."""
    method, frames, size = find_method(name), equal_tiles(4, (SIDE, SIDE)), SIDE * SIDE
    rng = np.random.default_rng(keep)
    count = len(frames) * size
    cues: dict[str, np.ndarray] = {}
    for cue in method.needs:
        rows = rng.normal(size=(1, count, 8)) if "image" in cue else rng.permutation(count)[None] / 128
        cues[cue] = rows.astype(np.float32)
    found = Shared(method, frames, keep, {}, "frame")(**{cue: torch.from_numpy(cues[cue]) for cue in cues})
    wanted: list[int] = []
    for number, share in enumerate(dealt([size] * 4, keep)):
        own = {cue: values[0, number * size : (number + 1) * size] for cue, values in cues.items()}
        indices, margin = REFERENCES[name]((SIDE, SIDE), share, **own)
        assert margin > MARGINS.get(name, 0), "a close call: take another seed"
        wanted += [number * size + index for index in indices]
    assert found[0].tolist() == wanted


def test_frames_get_equal_shares_and_the_first_ones_the_rest() -> None:
    assert dealt([9] * 4, 14, "frame") == [4, 4, 3, 3]
    with pytest.raises(UsageError, match="3 is fewer than the 4 frames of a video; with --share frame each"):
        dealt([9] * 4, 3, "frame")


@pytest.mark.parametrize("which", range(FRAMES))
def test_no_frame_starves(bundle: Callable[..., Path], saved: Callable[..., Any], which: int) -> None:
    """Each keeps its share, whatever it shows, of the scores that transformers' own tower gives."""
    video = busy(FRAMES, which)
    with Pipeline.load(bundle(method="fastervlm"), "ort-cpu", 1) as pipe:
        assert pipe.manifest.method.share == "frame"
        assert pipe.manifest.parity["generation"]["7"]["tokens"] == 16
        result = pipe.generate(video, ASKED, max_new_tokens=2)
    assert result.kept_per_frame == [3, 2, 2] and result.to_json()["kept_per_frame"] == [3, 2, 2]
    reference = ClipReference(saved(save_video_llava)[1])
    with torch.no_grad(), reference.eager():
        scores = reference.vision(pixels_of(video), {"attention_scores"})["attention_scores"].numpy()[0]
    patches = len(scores) // FRAMES
    wanted: list[int] = []
    for number, share in enumerate([3, 2, 2]):
        own = scores[number * patches : (number + 1) * patches]
        indices, margin = REFERENCES["fastervlm"]((4, 4), share, attention_scores=own)
        assert margin > 1e-6
        wanted += [number * (patches + 1) + 1 + index for index in indices]  # behind the frame's CLS
    assert result.kept == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save", "wishes"),
    [
        (save_video_llava, {"method": "focal"}),  # reads the grid, which a clip as a whole does not have
        (save_video_llava, {"method": "visionzip", "target": "jetpack6"}),
        (save_next_video, {"method": "prumerge"}),
        (save_next_video, {"method": "cdpruner", "target": "tensorrt", "dtype": "float32"}),
        (save_onevision, {"method": "cdpruner"}),
    ],
)
def test_every_family_of_videos_shares(
    bundle: Callable[..., Path], save: Callable[..., Any], wishes: dict[str, Any]
) -> None:
    """Merged and question-aware choices as well, held against torch at the export, on ONNX Runtime."""
    with Pipeline.load(bundle(save, **wishes), "ort-cpu", 1) as pipe:
        assert pipe.manifest.parity["generation"]["7"]["tokens"] > 1
        result = pipe.generate(busy(FRAMES, 1), ASKED, max_new_tokens=2)
    assert result.kept_per_frame == [3, 2, 2]


@pytest.mark.slow
def test_pooled_frames_share_as_well(bundle: Callable[..., Path], saved: Callable[..., Any]) -> None:
    """LLaVA-OneVision's, at the projector: DivPrune's loops on the embeddings that transformers makes."""
    video = clip(FRAMES)
    with Pipeline.load(bundle(save_onevision, method="divprune"), "ort-cpu", 1) as pipe:
        kept = pipe.generate(video, ASKED, max_new_tokens=2).kept
    with torch.no_grad():
        reference = PooledReference(saved(save_onevision)[1])
        frames = pixels_of(video, ONEVISION)
        patches = reference.vision(frames, set())["image_features"]
        embeds = reference.tokens(frames, patches)[0][0].numpy()
    wanted: list[int] = []
    for number, share in enumerate([3, 2, 2]):
        own = embeds[number * 9 : (number + 1) * 9]
        indices, margin = REFERENCES["divprune"]((3, 3), share, image_embeds=own)
        assert margin > MARGINS["divprune"]
        wanted += [number * 9 + index for index in indices]
    assert kept == wanted


def test_the_result_says_it_for_any_bundle_for_videos(bundle: Callable[..., Path]) -> None:
    """One budget for the whole clip, too, so that it shows who starves; pictures have no such number."""
    with Pipeline.load(bundle(method="fastervlm", share="picture"), "ort-cpu", 1) as pipe:
        result = pipe.generate(busy(FRAMES, 0), ASKED, max_new_tokens=2)
        assert result.kept_per_frame is not None and sum(result.kept_per_frame) == len(result.kept) == 7
        frame = pipe.manifest.visual.frame
        assert frame is not None
        per_frame = [sum(place // frame.step == number for place in result.kept) for number in range(FRAMES)]
        assert result.kept_per_frame == per_frame
        assert "kept_per_frame" not in pipe.generate(NO_PICTURE, ASKED, max_new_tokens=2).to_json()


def test_tokens_that_are_no_patches_count_for_no_frame(bundle: Callable[..., Path]) -> None:
    manifest = open_bundle(bundle(method="fastervlm")).manifest
    visual = dataclasses.replace(manifest.visual, frame=FrameInfo([2, 2], 1, 5))
    manifest = dataclasses.replace(manifest, visual=visual)
    assert kept_per_frame(manifest, [0, 1, 4, 5, 6, 10, 14]) == [2, 1, 1]  # 0, 5 and 10 are each frame's CLS


def test_the_command_says_how_many_of_each_frame(
    bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, frame in enumerate(busy(FRAMES, 2)):
        Image.fromarray(frame).save(tmp_path / f"frame{number}.png")
    asked = ["--video", str(tmp_path), "--prompt", ASKED, "--max-new-tokens", "2"]
    folder = str(bundle(method="fastervlm"))
    assert vtp_run([folder, *asked]) == 0
    assert "visual tokens: 51 → 7 (of each frame: 3, 2, 2)" in capsys.readouterr().err
    assert vtp_run([folder, *asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_per_frame"] == [3, 2, 2]


@pytest.mark.parametrize(
    ("wishes", "problem"),
    [
        ({"frames": None}, "and here family video_llava has pictures; leave it out, or give --frames 2"),
        ({"frames": 1}, "and here family video_llava has a single one; leave it out"),
        ({"method": "evs", "keep_tokens": "20"}, "evs compares each with the one before; leave out --share"),
        ({"method": "fastv"}, "--share frame is for methods at the vision or projector site, and method fas"),
        ({"keep_tokens": "2"}, "keep-tokens 2 is fewer than the 3 frames of a video"),
        ({"share": "tile"}, "looks at one in one piece; leave it out, or give --share frame, or choose"),
        ({"method": "none", "keep_tokens": None}, "method none keeps all of them"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tmp_path: Path, saved: Callable[..., Any], wishes: dict[str, Any], problem: str
) -> None:
    folder = saved(save_video_llava)[0]
    asked = {"method": "fastervlm", "keep_tokens": "7", "frames": FRAMES, "share": "frame", **wishes}
    with pytest.raises(UsageError, match=problem) as refused:
        export(Request(tmp_path / "bundle", model=str(folder), **asked))
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_families_of_pictures_refuse_it(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="--share frame deals K to the frames of a video, and here family l"):
        export(Request(tmp_path / "bundle", str(model_folder("gqa")), "vispruner", "3", share="frame"))


def test_a_bundle_for_pictures_that_says_frames_is_refused(
    exported: Callable[[str], Any], tmp_path: Path
) -> None:
    folder = exported("vispruner").folder
    data = json.loads((folder / "manifest.json").read_text())
    data["method"]["share"] = "frame"
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(VtpError, match="share is 'frame', and the bundle is for pictures; export the bundle"):
        open_bundle(tmp_path)
