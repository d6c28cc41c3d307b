"""Prompts without a picture: every family answers them as transformers does, whatever prunes its pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from vtp.engines import VtpError
from vtp.runtime import NO_PICTURE, Pipeline
from vtp.runtime.generation.options import GenerateOptions
from vtp.runtime.prompt.prompter import PromptTooLong
from vtp.runtime.scheduler import Scheduler

from ...models.tiny import save_tiny
from ...models.tiny_families import save_anyres
from ...models.tiny_gemma import save_gemma, tiny_gemma3, tiny_paligemma
from ...models.tiny_qwen import save_qwen
from ...models.tiny_split import save_idefics3, save_internvl
from ...models.tiny_video import save_video_llava
from ...once import Once

STEPS = 24
ASKED = ["what shape is the red ?", "how many ?", "what color is the star ? " * 5]


def save_gemma3(path: Path) -> Any:
    return save_gemma(path, tiny_gemma3())


def save_paligemma(path: Path) -> Any:
    return save_gemma(path, tiny_paligemma())


QWEN = {"method": "fastv", "keep_tokens": "4", "image_size": (32, 48)}

# Name: how the model is saved, its options, fields of the export's Request.
BUNDLES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "llava-jetpack6": (
        save_tiny,
        {"layers": 3},
        {"method": "adaptprune", "keep_tokens": "5", "target": "jetpack6", "dtype": "float32"},
    ),
    "llava-sparsevlm": (save_tiny, {"layers": 4}, {"method": "sparsevlm", "keep_tokens": "5"}),
    "llava_next-vispruner": (
        save_anyres,
        {"kind": "llava_next"},
        {"method": "vispruner", "keep_tokens": "6"},
    ),
    "qwen2_vl-fastv": (save_qwen, {"kind": "qwen2_vl"}, QWEN),
    "qwen3_vl-fastv": (save_qwen, {"kind": "qwen3_vl"}, QWEN),
    "gemma3-fastv": (save_gemma3, {}, {"method": "fastv", "keep_tokens": "6"}),
    "paligemma-vispruner": (save_paligemma, {}, {"method": "vispruner", "keep_tokens": "6"}),
    "internvl-vispruner": (save_internvl, {}, {"method": "vispruner", "keep_tokens": "5"}),
    "idefics3-fastv": (save_idefics3, {}, {"method": "fastv", "keep_tokens": "5"}),
    "video_llava-fastv": (save_video_llava, {}, {"method": "fastv", "keep_tokens": "6", "frames": 3}),
}


@pytest.fixture(scope="module")
def bundle(
    once: Once, saved: Callable[..., Any], exported: Callable[[str], Any]
) -> Callable[[str], tuple[Path, Any]]:
    """A bundle by name and its torch model; exported at the first call."""

    def get(name: str) -> tuple[Path, Any]:
        if name == "llava-adaptprune":  # which many tests share
            made = exported("adaptprune")
            return made.folder, LlavaForConditionalGeneration.from_pretrained(made.model).eval()
        save, options, wishes = BUNDLES[name]
        folder, model = saved(
            save, *options.get("kind", "").split(), **{k: v for k, v in options.items() if k != "kind"}
        )
        return once.bundle(folder, max_length=256, verify="none", **wishes), model

    return get


# One target, a decoder in parts, positions along three axes, an attention mask of its own.
QUICK = {"llava-adaptprune", "qwen3_vl-fastv", "gemma3-fastv"}
NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in ("llava-adaptprune", *BUNDLES)
]


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_transformers(bundle: Callable[[str], tuple[Path, Any]], name: str) -> None:
    folder, model = bundle(name)
    with Pipeline.load(folder, threads=1) as pipe:
        for words in ASKED:
            ids = pipe.prepare(NO_PICTURE, words, None, GenerateOptions()).request.prompt.ids
            wanted = answer_of(model, ids, list(pipe.manifest.text.eos_token_ids))
            result = pipe.generate(NO_PICTURE, words, max_new_tokens=STEPS)
            assert result.token_ids == wanted
            assert result.visual_tokens == (0, 0) and result.kept == []
            assert result.prompt_tokens == len(ids)
            assert "vision_encoder" not in result.timings.stages


def answer_of(model: Any, ids: list[int], ends: list[int]) -> list[int]:
    """What transformers' own greedy generation says."""
    asked = torch.tensor([ids])
    with torch.no_grad():
        said = model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )
    found: list[int] = said[0, len(ids) :].tolist()
    return found


def test_others_go_on_beside_them(bundle: Callable[[str], tuple[Path, Any]]) -> None:
    """In a batch, in a scheduler, and with prefixes kept: with and without pictures, each as alone."""
    folder, _ = bundle("llava-adaptprune")
    pictures = [NO_PICTURE, PICTURE, NO_PICTURE, [PICTURE], NO_PICTURE]
    words = [*ASKED, "where is it ?", "and now ?"]
    with Pipeline.load(folder, threads=1) as pipe:
        alone = [said(pipe.generate(*one, max_new_tokens=STEPS)) for one in zip(pictures, words, strict=True)]
        batch = pipe.generate_batch(pictures, words, max_new_tokens=STEPS)
        assert [said(one) for one in batch] == alone
        with Scheduler(pipe, slots=3) as scheduler:
            tickets = [
                scheduler.submit(*one, max_new_tokens=STEPS) for one in zip(pictures, words, strict=True)
            ]
            assert [said(ticket.result(60)) for ticket in tickets] == alone


def test_prefixes_are_kept(exported: Callable[[str], Any]) -> None:
    folder = exported("vispruner").folder
    talk = [{"role": "user", "content": ASKED[0]}]
    with Pipeline.load(folder, threads=1) as pipe:
        first = pipe.generate(NO_PICTURE, messages=talk, max_new_tokens=STEPS)
        talk += [{"role": "assistant", "content": "a star"}, {"role": "user", "content": ASKED[1]}]
        wanted = said(pipe.generate(NO_PICTURE, messages=talk, max_new_tokens=STEPS))
    with Pipeline.load(folder, threads=1, prefix_caching=True) as pipe:
        assert said(pipe.generate(NO_PICTURE, messages=talk[:1], max_new_tokens=STEPS)) == said(first)
        result = pipe.generate(NO_PICTURE, messages=talk, max_new_tokens=STEPS)
        assert said(result) == wanted and result.timings.reused_tokens > 5


def test_room_is_that_of_the_smallest_cache(bundle: Callable[[str], tuple[Path, Any]]) -> None:
    """Behind the pruner the cache lacks the places of what it drops: 256 - 16 + 7."""
    folder, _ = bundle("llava-adaptprune")
    with Pipeline.load(folder, threads=1) as pipe:
        room = min(graph.kv.capacity for graph in pipe.manifest.graphs.values() if graph.kv)
        assert room < pipe.manifest.model.max_length
        words = "how many ?"
        while True:
            try:
                tokens = pipe.prepare(NO_PICTURE, words, None, GenerateOptions()).request.prompt.text_tokens
            except PromptTooLong as error:
                wanted = f"without a picture this bundle has room for {room - 1};"
                assert wanted in str(error)
                break
            words += " red"
        result = pipe.generate(NO_PICTURE, words.removesuffix(" red"), max_new_tokens=400)
        assert tokens < room and len(result.token_ids) >= 1


def test_messages_without_pictures(bundle: Callable[[str], tuple[Path, Any]]) -> None:
    folder, _ = bundle("llava-adaptprune")
    with Pipeline.load(folder, threads=1) as pipe:
        for image in ([], ()):
            with pytest.raises(VtpError, match=r"no picture is given; give one, .* or NO_PICTURE"):
                pipe.generate(image, "what ?")
        with pytest.raises(VtpError, match="the messages hold 1 images, and 0 pictures are given"):
            pipe.generate(NO_PICTURE, messages=[{"role": "user", "content": [{"type": "image"}]}])


PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def said(result: Any) -> tuple[Any, ...]:
    return result.token_ids, result.text, result.kept, result.visual_tokens, result.prompt_tokens
