"""Video-LLaVA: its pictures against transformers, with the tower that is theirs; videos are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

from vtp.engines import UsageError, VtpError
from vtp.export.exporter import Request, export
from vtp.runtime import Pipeline
from vtp.runtime.bundle import open_bundle
from vtp.runtime.preprocess import preprocess
from vtp.runtime.result import Timings
from vtp.runtime.stages import StageRunner

from .tiny import (
    BOS,
    CHAT_TEMPLATE,
    END,
    EOS,
    IMAGE,
    PAD,
    randomize,
    text_config,
    tiny_tokenizer,
    vision_config,
)

COUNT, VIDEO = 16, 0  # visual tokens of a picture; an id that no test uses
PROCESSOR = VideoLlavaImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
METHODS = ["vispruner", "divprune", "fastv"]


def tiny_video_llava() -> Any:
    """A random model in eval mode, of 16 visual tokens; its two towers differ."""
    config = VideoLlavaConfig(
        vision_config=vision_config("clip", 56, 14, 3),
        text_config=text_config("llama", 4, 2, 3, 8, False),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=COUNT,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = VideoLlavaForConditionalGeneration(config)
    randomize(model, 4)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=[EOS, END], pad_token_id=PAD, do_sample=False
    )
    return model.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A complete Hugging Face folder, and the model in it."""
    folder, made = tmp_path_factory.mktemp("video") / "model", tiny_video_llava()
    made.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder, made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, model: tuple[Path, Any]) -> Callable[[str], Path]:
    """A bundle by method, exported, and held against torch, at the first call."""
    root, made = tmp_path_factory.mktemp("video-bundles"), dict[str, Path]()

    def get(method: str) -> Path:
        if method not in made:
            keep = None if method == "none" else "6"
            made[method] = export(Request(root / method, str(model[0]), method, keep, max_length=96)).folder
        return made[method]

    return get


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_picture_equals_transformers(bundle: Callable[[str], Path], model: tuple[Path, Any]) -> None:
    """From the picture on: 20 greedy tokens and their logits."""
    torch_model, words, picture = model[1], [40, 50, 60, 70], noise(61, 90)
    given = PROCESSOR(picture, return_tensors="pt")
    pixels = given["pixel_values_images" if "pixel_values_images" in given else "pixel_values"]
    ids = torch.tensor([[BOS, *[IMAGE] * COUNT, *words]])
    torch_model.generation_config.eos_token_id = None
    with torch.no_grad():
        answer = torch_model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=20,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    opened = open_bundle(bundle("none"))
    runner = StageRunner(opened, "ort-cpu", 1)
    ours = preprocess(picture, opened.manifest.image)
    assert np.array_equal(ours, pixels.numpy())
    values = runner.prefill(COUNT, ours, [BOS, IMAGE, *words], 1, Timings())
    logits, position = values["logits"].numpy()[0, 0], int(values["next_position"].numpy()[0])
    tokens: list[int] = []
    for wanted in answer.logits:
        assert np.abs(logits - wanted[0].numpy()).max() < 1e-3
        tokens.append(int(logits.argmax()))
        logits = runner.step(COUNT, tokens[-1], position)
        position += 1
    runner.close()
    assert tokens == answer.sequences[0, -20:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_pruned_equals_the_torch_reference(bundle: Callable[[str], Path], method: str) -> None:
    """The export's own check ran, or there would be no bundle."""
    with Pipeline.load(bundle(method), engine="ort-cpu") as pipe:
        assert pipe.manifest.parity["generation"]["6"]["tokens"] == 16
        result = pipe.generate(noise(31, 90), "what is it ?", max_new_tokens=4)
        assert (result.visual_tokens.before, result.visual_tokens.after) == (COUNT, 6)


def test_a_video_is_refused(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(64))
    frames = np.zeros((8, 56, 56, 3), np.uint8)
    asked = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what ?"}]}]
    with Pipeline.load(bundle("none"), engine="ort-cpu") as pipe:
        with pytest.raises(VtpError, match=r"clip\.mp4' is a video, and pictures are served"):
            pipe.generate(clip, "what ?")
        with pytest.raises(UsageError, match=r"not \[8, 56, 56, 3\]"):
            pipe.generate(frames, "what ?")
        with pytest.raises(UsageError, match="a part of type 'video'; choose text or image"):
            pipe.generate(noise(9, 9), messages=asked)
