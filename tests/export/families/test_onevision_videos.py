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
from .test_video_llava import ASKED, follow, generate

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
    answer = generate(model[1], ids, pixel_values_videos=frames[None])
    ours = preprocess(load_video(video, FRAMES), open_bundle(folder).manifest.image)
    assert np.array_equal(ours, frames.numpy())
    tokens = follow(folder, ours, [BOS, VIDEO, *WORDS], 1, answer.logits)
    assert tokens == answer.sequences[0, -20:].tolist()
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
