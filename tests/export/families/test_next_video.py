"""LLaVA-NeXT-Video against transformers: pooled frames of a video, and the tiles of a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor, LlavaNextVideoProcessor

from vtp.engines import UsageError, VtpError
from vtp.export.checkpoint.loading import load
from vtp.export.exporter import Request, export
from vtp.export.families.llava.llava_next_video import ClipReference
from vtp.export.pruners import find_method
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.media.videos import load_video
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter

from ...models.tiny import BOS, IMAGE
from ...models.tiny_video import VIDEO, clip, pixels_of, save_next_video, video_tokenizer
from ...once import Once
from ...oracles.several_pictures import noises
from .compared import follow
from .test_video_llava import ASKED, generate

FRAMES = 3
TOKENS = FRAMES * 4
# What the video processor does to a frame; with torchvision alone can that class itself be made.
PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
QUICK = "vispruner"


@pytest.fixture(scope="module")
def model(saved: Callable[..., Any]) -> tuple[Path, Any]:
    """A complete Hugging Face folder, and the model in it."""
    return saved(save_next_video)


@pytest.fixture(scope="module")
def bundle(once: Once, model: tuple[Path, Any]) -> Callable[..., Path]:
    """A bundle by method and frames, exported, and held against torch, at the first call."""

    def get(method: str, frames: int | None = FRAMES, **more: Any) -> Path:
        keep = {} if method == "none" else {"keep_tokens": f"5,{TOKENS}" if frames else "5"}
        wishes = {"max_length": 160, "frames": frames, "verify": "full", **keep, **more}
        return once.bundle(model[0], method=method, **wishes)

    return get


def transformers_ids(frames: torch.Tensor) -> torch.Tensor:
    """The prompt as transformers' processor, which needs torchvision, writes it for frames [F,3,H,W]."""
    tokenizer = video_tokenizer()
    content = [{"type": "video"}, {"type": "text", "text": ASKED}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    stand_in: Any = SimpleNamespace(patch_size=14, video_token="<video>")
    wide = LlavaNextVideoProcessor.replace_video_token(stand_in, {"pixel_values_videos": frames[None]}, 0)
    return tokenizer(text.replace("<video>", wide), return_tensors="pt").input_ids


@pytest.mark.parametrize(
    "method", [QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in ("none", "fastv"))]
)
def test_a_video_with_all_tokens_equals_transformers(
    bundle: Callable[..., Path], model: tuple[Path, Any], method: str
) -> None:
    """From seven frames on: pixels, prompt, 20 greedy tokens and their logits."""
    video, folder = clip(7), bundle(method)
    frames = pixels_of(video[[0, 2, 4]], PROCESSOR)
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


@pytest.mark.parametrize(
    "method",
    [QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in ("visionzip", "fastv", "divprune"))],
)
def test_a_pruned_video_equals_the_torch_reference(
    bundle: Callable[..., Path], model: tuple[Path, Any], method: str
) -> None:
    """Selection included, which the export's own check takes from the bundle: K of the whole clip."""
    video = clip(FRAMES)
    with Pipeline.load(bundle(method), engine="ort-cpu") as pipe:
        assert pipe.manifest.parity["generation"]["5"]["tokens"] == 16
        pipe.manifest.text.__dict__["eos_token_ids"] = ()
        result = pipe.generate(video, ASKED, max_new_tokens=12, keep_tokens=5)
        assert (result.visual_tokens.before, result.visual_tokens.after) == (TOKENS, 5)
        options, positions = pipe.manifest.method.options, pipe.manifest.method.positions
    frames = pixels_of(video, PROCESSOR)
    pruner = find_method(method)((1, TOKENS), 5, **options)
    answer = reference_generate(
        model[1], pruner, transformers_ids(frames), frames, 12, (), positions, reference=ClipReference
    )
    assert result.kept == answer.keep_indices.tolist() and result.token_ids == answer.token_ids


@pytest.mark.slow
def test_a_picture_equals_transformers(bundle: Callable[..., Path], model: tuple[Path, Any]) -> None:
    """LLaVA-NeXT's tiles: 20 greedy tokens and their logits."""
    folder, words, picture = bundle("none", None, image_size=(56, 112)), [40, 50, 60], noises(1, 56, 112)[0]
    opened = open_bundle(folder)
    ours, count = preprocess(picture, opened.manifest.image), opened.manifest.visual.count
    ids = torch.tensor([[BOS, *[IMAGE] * count, *words]])
    given = {"pixel_values": torch.from_numpy(ours)[None], "image_sizes": torch.tensor([[56, 112]])}
    said, logits = generate(model[1], ids, **given)
    tokens, _ = follow(folder, ours, [BOS, IMAGE, *words], 1, logits)
    assert tokens == said


@pytest.mark.slow
@pytest.mark.parametrize("frames", [None, FRAMES])
@pytest.mark.parametrize(
    "more",
    [
        {"dtype": "float16"},
        {"verify": "layers"},
        {"target": "jetpack6"},
        {"target": "tensorrt"},
        {"tower": "ipcv", "tower_options": ["keep=0.5", "cut=1", "stable=2"]},
    ],
)
def test_other_forms(bundle: Callable[..., Path], more: dict[str, Any], frames: int | None) -> None:
    """The export's own check ran, or there would be no bundle."""
    assert open_bundle(bundle("vispruner", frames, **more)).manifest.parity["generation"]["5"]["tokens"] > 1


def test_what_is_refused(model: tuple[Path, Any], tmp_path: Path, saved: Callable[..., Any]) -> None:
    asked = Request(tmp_path / "out", str(model[0]), "adaptprune", "5", frames=FRAMES, verify="none")
    with pytest.raises(UsageError, match=r"needs grid, .* its tokens lie in several frames"):
        export(asked)
    save_next_video(tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "spatial_pool_mode": "max"}))
    with pytest.raises(
        VtpError, match="spatial_pool_mode 'max' with stride 2 over 4 patches is not supported"
    ):
        load(tmp_path / "other", "float32", frames=FRAMES)
