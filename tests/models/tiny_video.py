"""Tiny random models that answer about videos, from transformers' own config and processor classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

from .tiny import BOS, END, EOS, IMAGE, PAD, VOCAB, randomize, text_config, tiny_tokenizer, vision_config

COUNT = 16  # visual tokens of a picture; a frame of a video has one more, for CLS
VIDEO = VOCAB  # the id behind the tokenizer's pieces
PROCESSOR = VideoLlavaImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
# A turn's pictures, then its videos, then its words: the order of the published model's template.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for kind in ['image', 'video'] %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', kind) %}<{{ kind }}>\n{% endfor %}"
    "{% endfor %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'text') %}{{ item['text'] }}"
    "{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


SIDE = 35  # of a LLaVA-OneVision's frame, of 5 x 5 patches, which become 3 x 3 tokens
# What LlavaOnevisionVideoProcessor does to a frame; with torchvision alone can that class itself be made.
ONEVISION = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)


def tiny_video_llava() -> Any:
    """A random model in eval mode, of 16 visual tokens a picture; its two towers differ."""
    config = VideoLlavaConfig(
        vision_config=vision_config("clip", 56, 14, 3),
        text_config=text_config("llama", 4, 2, 3, 8, False, vocab_size=VOCAB + 8),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=COUNT,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return _filled(VideoLlavaForConditionalGeneration(config))


def tiny_onevision() -> Any:
    """A random LLaVA-OneVision in eval mode, of 9 visual tokens a frame."""
    config = LlavaOnevisionConfig(
        vision_config=vision_config("siglip", SIDE, 7, 2),
        text_config=text_config("qwen2", 4, 2, 3, 8, False, vocab_size=VOCAB + 8),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[SIDE, SIDE]],
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return _filled(LlavaOnevisionForConditionalGeneration(config))


def tiny_next_video() -> Any:
    """A random LLaVA-NeXT-Video in eval mode, of 16 patches a view, 4 visual tokens a frame."""
    config = LlavaNextVideoConfig(
        vision_config=vision_config("clip", 56, 14, 3),
        text_config=text_config("llama", 4, 2, 3, 8, False, vocab_size=VOCAB + 8),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[56, 112], [112, 56]],
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return _filled(LlavaNextVideoForConditionalGeneration(config))


def _filled(model: Any) -> Any:
    randomize(model, 4)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=[EOS, END], pad_token_id=PAD, do_sample=False
    )
    return model.eval()


def video_tokenizer() -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with <video> behind its pieces."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    assert tokenizer.convert_tokens_to_ids("<video>") == VIDEO
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_video_llava(folder: Path) -> Any:
    """Write a complete Hugging Face folder, and return the model."""
    model = tiny_video_llava()
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    video_tokenizer().save_pretrained(folder)
    return model


def save_onevision(folder: Path) -> Any:
    """The same for a LLaVA-OneVision; its files name the processor of videos as transformers writes it."""
    model = tiny_onevision()
    model.save_pretrained(folder)
    LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=model.config.image_grid_pinpoints
    ).save_pretrained(folder)
    videos = {
        "size": {"height": SIDE, "width": SIDE},
        "do_sample_frames": False,
        "return_metadata": False,
        "video_processor_type": "LlavaOnevisionVideoProcessor",
    }
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    video_tokenizer().save_pretrained(folder)
    return model


def save_next_video(folder: Path) -> Any:
    """The same for a LLaVA-NeXT-Video."""
    model = tiny_next_video()
    model.save_pretrained(folder)
    square = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    points = model.config.image_grid_pinpoints
    LlavaNextImageProcessorPil(**square, image_grid_pinpoints=points).save_pretrained(folder)
    videos = {**square, "do_sample_frames": False, "video_processor_type": "LlavaNextVideoVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    video_tokenizer().save_pretrained(folder)
    return model


def clip(frames: int, height: int = 61, width: int = 90, seed: int = 7) -> np.ndarray:
    """Noise uint8 [frames, height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def pixels_of(frames: np.ndarray, processor: Any = PROCESSOR) -> torch.Tensor:
    """What one of transformers' own image processors makes of frames [n,H,W,3]: [n,3,H,W]."""
    given = processor([Image.fromarray(frame) for frame in frames], return_tensors="pt")
    return given["pixel_values_images" if "pixel_values_images" in given else "pixel_values"]
