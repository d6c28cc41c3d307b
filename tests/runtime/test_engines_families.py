"""Families whose graphs hold what LLaVA's do not, on OpenVINO: the same tokens as on ONNX Runtime.

Window attention and three position axes (Qwen2.5-VL), a decoder whose attention is taken apart (Gemma 3), a
prefix seen both ways (PaliGemma), tiles (Idefics3).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.runtime import Pipeline

from ..export.families import test_qwen, test_split
from ..models.tiny_gemma import save_gemma, tiny_gemma3, tiny_paligemma
from ..models.tiny_qwen import save_qwen
from ..models.tiny_split import save_idefics3
from ..once import Once

pytest.importorskip("openvino", reason="openvino is not installed")

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8))
    for seed in range(2)
]
PROMPTS = ["what shape is it ?", "where ?"]
FAMILIES: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "qwen2.5": (
        lambda path: save_qwen(path, "qwen2_5_vl"),
        {"method": "divprune", "keep_tokens": "5", "image_size": (32, 48)},
    ),
    "gemma3": (lambda path: save_gemma(path, tiny_gemma3(seed=3)), {"method": "fastv", "keep_tokens": "6"}),
    "paligemma": (lambda path: save_gemma(path, tiny_paligemma()), {"method": "none"}),
    "idefics3": (save_idefics3, {"method": "fastv", "keep_tokens": "20"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_answers_token_for_token(once: Once, name: str) -> None:
    save, wishes = FAMILIES[name]
    model = once.folder(f"engines-{name}", save)
    hold_together(once.bundle(model, max_length=256, verify="none", **wishes))


def test_qwen2_5_answers_token_for_token(once: Once, saved: Callable[..., Any]) -> None:
    """On the bundle of its own tests."""
    model, size, wishes = test_qwen.BUNDLES["2.5-vispruner"]
    kind, options = test_qwen.MODELS[model]
    more = {"image_size": test_qwen.SIZES[size], "max_length": 256, "verify": "full", **wishes}
    hold_together(once.bundle(saved(save_qwen, kind, **options)[0], **more))


def test_idefics3_answers_token_for_token(once: Once, saved: Callable[..., Any]) -> None:
    """On the bundle of its own tests."""
    model, size, wishes = test_split.BUNDLES["idefics3-vispruner"]
    save, _, options = test_split.MODELS[model]
    more = {"image_size": size, "max_length": 256, "verify": "full", **wishes}
    hold_together(once.bundle(saved(save, **options)[0], **more))


def hold_together(folder: Path) -> None:
    """One picture, and a batch of two: the same tokens and kept tokens on both engines."""
    found = {}
    for engine in ("ort-cpu", "openvino-cpu"):
        with Pipeline.load(folder, engine, threads=1) as pipe:
            one = pipe.generate(PICTURES[0], PROMPTS[0], max_new_tokens=12)
            both = pipe.generate_batch(PICTURES, PROMPTS, max_new_tokens=12)
        found[engine] = [(result.token_ids, result.kept) for result in (one, *both)]
    assert found["openvino-cpu"] == found["ort-cpu"]
