"""Video-LLaVA: pictures and videos against transformers, each with the tower that is theirs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import VideoLlavaProcessor
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from vtp.engines import UsageError, VtpError
from vtp.export.checkpoint import loading as checkpoint
from vtp.export.exporter import Request, export
from vtp.export.families.llava.video_llava import ClipReference
from vtp.export.pruners.vispruner import VisPruner
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands.run import main
from vtp.runtime.media.videos import load_video
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter

from ...models.tiny import BOS, IMAGE
from ...models.tiny_video import COUNT, PROCESSOR, VIDEO, clip, pixels_of, save_video_llava, video_tokenizer
from ...once import Once
from ...oracles.several_pictures import by_transformers
from .compared import follow

FRAMES = 3
TOKENS = FRAMES * (COUNT + 1)
ASKED = "what is it ?"
METHODS = ["vispruner", "divprune", "fastv"]


@pytest.fixture(scope="module")
def model(saved: Callable[..., Any]) -> tuple[Path, Any]:
    """A complete Hugging Face folder, and the model in it."""
    return saved(save_video_llava)


@pytest.fixture(scope="module")
def bundle(once: Once, model: tuple[Path, Any]) -> Callable[..., Path]:
    """A bundle by method and frames, exported, and held against torch, at the first call."""

    def get(method: str, frames: int | None = FRAMES, **more: Any) -> Path:
        keep = {} if method == "none" else {"keep_tokens": "6"}
        wishes = {"max_length": 160, "frames": frames, "verify": "full", **keep, **more}
        return once.bundle(model[0], method=method, **wishes)

    return get


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(clip(1, height, width)[0])


def generate(model: Any, ids: torch.Tensor, **pixels: torch.Tensor) -> tuple[list[int], list[torch.Tensor]]:
    """20 greedy tokens of transformers' own, and the logits [V] behind each."""
    return by_transformers(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels})


def test_a_picture_equals_transformers(bundle: Callable[..., Path], model: tuple[Path, Any]) -> None:
    """From the picture on: 20 greedy tokens and their logits."""
    words, picture = [40, 50, 60, 70], noise(61, 90)
    pixels = pixels_of(np.asarray(picture)[None])
    said, logits = generate(model[1], torch.tensor([[BOS, *[IMAGE] * COUNT, *words]]), pixel_values=pixels)
    folder = bundle("none", None)
    ours = preprocess(picture, open_bundle(folder).manifest.image)
    assert np.array_equal(ours, pixels.numpy())
    tokens, _ = follow(folder, ours, [BOS, IMAGE, *words], 1, logits)
    assert tokens == said


def transformers_ids(frames: torch.Tensor) -> torch.Tensor:
    """The prompt as transformers' processor writes it for frames [F,3,H,W].

    The processor as a whole cannot be made here: its video processor needs torchvision.
    """
    tokenizer = video_tokenizer()
    content = [{"type": "video"}, {"type": "text", "text": ASKED}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    stand_in: Any = SimpleNamespace(patch_size=14, num_additional_image_tokens=1, video_token="<video>")
    wide = VideoLlavaProcessor.replace_video_token(stand_in, {"pixel_values_videos": frames[None]}, 0)
    return tokenizer(text.replace("<video>", wide), return_tensors="pt").input_ids


def test_a_video_equals_transformers(bundle: Callable[..., Path], model: tuple[Path, Any]) -> None:
    """From seven frames on: which are taken, pixels, prompt, 20 greedy tokens and their logits."""
    video, folder = clip(7), bundle("none")
    taken = default_sample_indices_fn(VideoMetadata(total_num_frames=7), num_frames=FRAMES)
    frames = pixels_of(video[taken])
    ids = transformers_ids(frames)
    assert int((ids == VIDEO).sum()) == TOKENS
    said, logits = generate(model[1], ids, pixel_values_videos=frames[None])
    opened = open_bundle(folder)
    ours = preprocess(load_video(video, FRAMES), opened.manifest.image)
    assert np.array_equal(ours, frames.numpy())
    prompter = Prompter(opened.manifest.text, opened.path("tokenizer.json"))
    prompt = prompter.encode(prompter.messages_for(ASKED))
    start = prompt.image_start
    assert [*prompt.ids[:start], *[VIDEO] * TOKENS, *prompt.ids[start + 1 :]] == ids[0].tolist()
    tokens, _ = follow(folder, ours, prompt.ids, start, logits)
    assert tokens == said
    # What pruned bundles are held against says the same where nothing is pruned.
    reference = reference_generate(model[1], None, ids, frames, 20, reference=ClipReference)
    assert reference.token_ids == tokens


def test_a_pruned_video_equals_the_torch_reference(
    bundle: Callable[..., Path], model: tuple[Path, Any]
) -> None:
    """Selection included, which the export's own check takes from the bundle: K of the whole clip."""
    video = clip(FRAMES)
    with Pipeline.load(bundle("vispruner"), engine="ort-cpu") as pipe:
        assert pipe.manifest.parity["generation"]["6"]["tokens"] == 16
        result = pipe.generate(video, ASKED, max_new_tokens=12)
        assert (result.visual_tokens.before, result.visual_tokens.after) == (TOKENS, 6)
        turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": ASKED}]}
        assert pipe.generate(list(video), messages=[turn], max_new_tokens=12).text == result.text
    frames = pixels_of(video)
    pruner = VisPruner((1, FRAMES * COUNT), 6)
    answer = reference_generate(
        model[1], pruner, transformers_ids(frames), frames, 12, (1, 2), reference=ClipReference
    )
    assert result.kept == answer.keep_indices.tolist()
    assert not any(place % (COUNT + 1) == 0 for place in result.kept)  # CLS tokens are not chosen from
    ours = result.token_ids
    assert ours == answer.token_ids[: len(ours)]


def test_videos_in_a_batch_are_answered_as_alone(bundle: Callable[..., Path]) -> None:
    videos, asked = [clip(9, seed=3), clip(FRAMES)], ["how many red stars ?", ASKED]
    with Pipeline.load(bundle("vispruner"), engine="ort-cpu") as pipe:
        pairs = zip(videos, asked, strict=True)
        alone = [pipe.generate(video, words, max_new_tokens=8) for video, words in pairs]
        together = pipe.generate_batch(videos, asked, max_new_tokens=8)
    assert [(one.token_ids, one.kept) for one in together] == [(one.token_ids, one.kept) for one in alone]


@pytest.mark.slow
@pytest.mark.parametrize("frames", [None, FRAMES])
@pytest.mark.parametrize("method", METHODS)
def test_pruned_equals_the_torch_reference(
    bundle: Callable[..., Path], method: str, frames: int | None
) -> None:
    """The export's own check ran, or there would be no bundle."""
    with Pipeline.load(bundle(method, frames), engine="ort-cpu") as pipe:
        assert pipe.manifest.parity["generation"]["6"]["tokens"] == 16
        seen = noise(31, 90) if frames is None else clip(5, 31, 90)
        result = pipe.generate(seen, ASKED, max_new_tokens=4)
        before = COUNT if frames is None else TOKENS
        assert (result.visual_tokens.before, result.visual_tokens.after) == (before, 6)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"dtype": "float16"}, {"verify": "layers"}, {"target": "jetpack6"}])
def test_videos_in_other_forms(bundle: Callable[..., Path], more: dict[str, str]) -> None:
    assert open_bundle(bundle("vispruner", **more)).manifest.parity["generation"]["6"]["tokens"] > 1


def test_the_video_processor_s_settings_come_first(model: tuple[Path, Any], tmp_path: Path) -> None:
    """Where they are looked for: as in transformers, and for videos alone."""
    folder = tmp_path / "model"
    shutil.copytree(model[0], folder)
    settings = {**json.loads((folder / "preprocessor_config.json").read_text()), "do_sample_frames": False}
    del settings["image_processor_type"]
    settings["video_processor_type"] = "VideoLlavaVideoProcessor"
    own, shared = folder / "video_preprocessor_config.json", folder / "processor_config.json"
    own.write_text(json.dumps({**settings, "image_mean": [0.25, 0.5, 0.75]}))
    assert checkpoint.load(folder, "float32", frames=2).image.mean == (0.25, 0.5, 0.75)
    shared.write_text(json.dumps({"video_processor": {**settings, "image_mean": [0.5, 0.5, 0.5]}}))
    assert checkpoint.load(folder, "float32", frames=2).image.mean == (0.5, 0.5, 0.5)
    assert checkpoint.load(folder, "float32").image.mean == tuple(PROCESSOR.image_mean)


def test_a_video_is_refused_where_pictures_are_served(bundle: Callable[..., Path], tmp_path: Path) -> None:
    film = tmp_path / "clip.mp4"
    film.write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(64))
    asked = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what ?"}]}]
    folder = bundle("none", None)
    with Pipeline.load(folder, engine="ort-cpu") as pipe:
        with pytest.raises(VtpError, match=r"clip\.mp4' is a video, and pictures are served"):
            pipe.generate(film, "what ?")
        with pytest.raises(UsageError, match=r"not \[8, 56, 56, 3\]; videos are for bundles made with"):
            pipe.generate(clip(8, 56, 56), "what ?")
        with pytest.raises(UsageError, match="a part of type 'video'; choose text or image"):
            pipe.generate(noise(9, 9), messages=asked)
    assert main([str(folder), "--video", str(tmp_path), "--prompt", "what ?"]) == 2


def test_a_picture_is_refused_where_videos_are_served(
    bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "still.png"
    noise(9, 9).save(file)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
    folder = bundle("none")
    with Pipeline.load(folder, engine="ort-cpu") as pipe:
        for picture in (file, noise(9, 9), np.asarray(noise(9, 9)), file.read_bytes()):
            with pytest.raises(UsageError, match="is a single picture, and this bundle answers about videos"):
                pipe.generate(picture, "what ?")
        with pytest.raises(UsageError, match=r"the video has 2 frames, and this bundle .* clips of 3; "):
            pipe.generate(clip(2), "what ?")
        with pytest.raises(UsageError, match="a part of type 'image'; choose text or video"):
            pipe.generate(clip(3), messages=asked)
        with pytest.raises(UsageError, match="holds '<video>', a control token"):
            pipe.generate(clip(3), "what is <video> ?")
    assert main([str(folder), "--image", str(file), "--prompt", "what ?"]) == 2
    error = capsys.readouterr().err
    assert "this bundle answers about videos of 3 frames: give --video instead of --image" in error
    both = ["--image", str(file), "--video", str(tmp_path)]
    assert main([str(folder), *both, "--prompt", "what ?"]) == 2
    assert "give either --image or --video" in capsys.readouterr().err


def test_the_command_answers_about_a_video(
    bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of frames, and the sheet of what was kept."""
    for number, frame in enumerate(clip(11)):
        Image.fromarray(frame).save(tmp_path / f"frame{number}.png")
    sheet, folder = tmp_path / "kept.png", str(bundle("vispruner"))
    asked = ["--video", str(tmp_path), "--prompt", ASKED, "--max-new-tokens", "8"]
    assert main([folder, *asked, "--show-kept", str(sheet)]) == 0
    printed = capsys.readouterr()
    assert f"visual tokens: {TOKENS} → 6" in printed.err
    with Pipeline.load(folder, engine="ort-cpu") as pipe:
        expected = pipe.generate(clip(11)[[0, 3, 7]], ASKED, max_new_tokens=8)
    assert printed.out.strip() == expected.text.strip()
    with Image.open(sheet) as shown:
        assert shown.size == (2 * 90 + 6, 2 * 61 + 6)  # three frames, in two rows


def test_what_videos_do_not_have_is_refused(model: tuple[Path, Any], tmp_path: Path) -> None:
    def ask(**request: Any) -> None:
        export(Request(tmp_path / "no", str(model[0]), **{"method": "vispruner", "frames": 3, **request}))

    with pytest.raises(UsageError, match=r"needs grid, .* its tokens lie in several frames; nearest methods"):
        ask(method="adaptprune")
    with pytest.raises(UsageError, match="frames 0 is outside 1 to"):
        ask(frames=0)
    with pytest.raises(VtpError, match="knows 1024 positions: too few for its 1700 visual tokens"):
        ask(frames=100)
    with pytest.raises(UsageError, match="keep-tokens 49 is outside the 48 visual tokens"):
        ask(keep_tokens="49")
    assert not (tmp_path / "no").exists()


def test_other_families_have_no_videos(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"family llava serves pictures, not videos: leave out --frames; .*video"
    ):
        export(Request(tmp_path / "no", str(model_folder("mha")), "none", frames=4))
