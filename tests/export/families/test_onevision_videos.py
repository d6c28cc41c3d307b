"""LLaVA-OneVision's videos against transformers: frames pooled, one line's end behind them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionProcessor

from vtp.engines import UsageError
from vtp.export.exporter import Request, export
from vtp.export.families.llava.llava_onevision import ClipReference
from vtp.export.pruners.divprune import DivPrune
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.media.videos import load_video
from vtp.runtime.preprocess import preprocess

from ...models.tiny import BOS
from ...models.tiny_video import ONEVISION, VIDEO, clip, pixels_of, save_onevision
from ...once import Once
from ...oracles.tensorrt_10_3 import refused
from .compared import follow
from .test_video_llava import ASKED, generate

FRAMES = 3
TOKENS = FRAMES * 9 + 1
WORDS = [40, 50, 60, 70]


@pytest.fixture(scope="module")
def model(saved: Callable[..., Any]) -> tuple[Path, Any]:
    """A complete Hugging Face folder, and the model in it."""
    return saved(save_onevision)


@pytest.fixture(scope="module")
def bundle(once: Once, model: tuple[Path, Any]) -> Callable[..., Path]:
    """A bundle for videos by method, exported, and held against torch, at the first call."""

    def get(method: str, **more: Any) -> Path:
        keep = {} if method == "none" else {"keep_tokens": "6"}
        wishes = {"max_length": 160, "frames": FRAMES, "verify": "full", **keep, **more}
        return once.bundle(model[0], method=method, **wishes)

    return get


def test_a_video_equals_transformers(bundle: Callable[..., Path], model: tuple[Path, Any]) -> None:
    """From seven frames on: pixels, placeholders, 20 greedy tokens and their logits."""
    video, folder = clip(7), bundle("none")
    frames = pixels_of(video[[0, 2, 4]], ONEVISION)
    stand_in: Any = SimpleNamespace(num_image_tokens=25, video_token="v")
    wide = LlavaOnevisionProcessor.replace_video_token(stand_in, {"pixel_values_videos": frames[None]}, 0)
    assert len(wide) == TOKENS
    ids = torch.tensor([[BOS, *[VIDEO] * TOKENS, *WORDS]])
    said, logits = generate(model[1], ids, pixel_values_videos=frames[None])
    ours = preprocess(load_video(video, FRAMES), open_bundle(folder).manifest.image)
    assert np.array_equal(ours, frames.numpy())
    tokens, _ = follow(folder, ours, [BOS, VIDEO, *WORDS], 1, logits)
    assert tokens == said
    assert reference_generate(model[1], None, ids, frames, 20, reference=ClipReference).token_ids == tokens


def test_a_pruned_video_equals_the_torch_reference(
    bundle: Callable[..., Path], model: tuple[Path, Any]
) -> None:
    """Selection among the pooled tokens included; the line's end is not chosen from."""
    video = clip(FRAMES)
    with Pipeline.load(bundle("divprune"), engine="ort-cpu") as pipe:
        assert pipe.manifest.parity["generation"]["6"]["tokens"] == 16
        result = pipe.generate(video, ASKED, max_new_tokens=8)
        assert (result.visual_tokens.before, result.visual_tokens.after) == (TOKENS, 6)
    ids = torch.tensor([[BOS, *[VIDEO] * TOKENS, *WORDS]])
    pruner = DivPrune((1, TOKENS - 1), 6)
    answer = reference_generate(
        model[1], pruner, ids, pixels_of(video, ONEVISION), 1, reference=ClipReference
    )
    assert result.kept == answer.keep_indices.tolist()


def test_evs_equals_the_published_rule(bundle: Callable[..., Path], model: tuple[Path, Any]) -> None:
    """A bundle, held against torch at its export, and its choice against torch's own cosines and sort."""
    video = clip(FRAMES)
    video[2, :, :50] = video[1, :, :50]  # the left of the last frame stands still
    with Pipeline.load(bundle("evs", keep_tokens="15"), engine="ort-cpu") as pipe:
        assert pipe.manifest.method.positions == "original"
        assert pipe.manifest.parity["generation"]["15"]["tokens"] == 16
        kept = pipe.generate(video, ASKED, max_new_tokens=4).kept
    with torch.no_grad():
        frames = pixels_of(video, ONEVISION)[None]
        tokens = model[1].model.get_video_features(frames, return_dict=True).pooler_output[0]
    patches = tokens[: FRAMES * 9].reshape(FRAMES, 9, -1)
    unlike = 1 - torch.nn.functional.cosine_similarity(patches[1:], patches[:-1], dim=-1)
    order = torch.argsort(unlike.flatten(), descending=True, stable=True)[: 15 - 9]
    assert kept == [*range(9), *sorted(9 + place for place in order.tolist())]


def test_evs_is_refused_where_nothing_moves(model: tuple[Path, Any], tmp_path: Path) -> None:
    wish = Request(tmp_path / "no", str(model[0]), "evs", "8", frames=FRAMES)
    with pytest.raises(UsageError, match=r"keep-tokens 8 is below the 9 patches .*; choose 9 to 27$"):
        export(wish)
    with pytest.raises(UsageError, match="evs compares the frames of a video, and this bundle is for pictur"):
        export(Request(tmp_path / "no", str(model[0]), "evs"))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"dtype": "float16"}, {"target": "jetpack6"}, {"verify": "layers"}])
def test_evs_in_other_forms(bundle: Callable[..., Path], more: dict[str, str]) -> None:
    opened = open_bundle(bundle("evs", keep_tokens="12", **more))
    assert opened.manifest.parity["generation"]["12"]["tokens"] > 1
    assert more.get("target") is None or not [*refused(opened.path("pruner.onnx"))]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"dtype": "float16"}, {"target": "jetpack6"}])
def test_other_methods_and_forms(bundle: Callable[..., Path], more: dict[str, str]) -> None:
    assert open_bundle(bundle("fastv", **more)).manifest.parity["generation"]["6"]["tokens"] == 16


def test_what_pooled_frames_do_not_have_is_refused(model: tuple[Path, Any], tmp_path: Path) -> None:
    sites = (
        r"acts at vision, which family llava_onevision does not serve for videos; its sites: projector, de"
    )
    with pytest.raises(UsageError, match=sites):
        export(Request(tmp_path / "no", str(model[0]), "vispruner", frames=FRAMES))
    with pytest.raises(UsageError, match=r"needs grid, .*: its tokens lie in several frames"):
        export(Request(tmp_path / "no", str(model[0]), "adaptprune", frames=FRAMES))
