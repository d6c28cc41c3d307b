"""Tiny random MiniCPM-V 4.6s from transformers' own config and processor classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6Processor,
)
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from .tiny import BOS, END, EOS, PAD, VOCAB, randomize
from .tiny_qwen import LINEAR, TEXT_CONFIG, steadied
from .tiny_split import marked_tokenizer

PATCH, EDGE = 4, 40
MARKS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<|image_pad|>\\n' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_minicpm(
    layers: int = 2, vision_layers: int = 3, insert: int = 1, seed: int = 0, side: int = 5
) -> Any:
    """A random MiniCPM-V 4.6 in eval mode, whose tower merges patches behind block `insert`.

    side  of the square table of places that its tower learned
    """
    tokenizer = minicpm_tokenizer()
    config = MiniCPMV4_6Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": 4,
            "image_size": side * PATCH,
            "patch_size": PATCH,
        },
        text_config={
            **TEXT_CONFIG,
            **LINEAR,
            "model_type": "qwen3_5_text",
            "vocab_size": VOCAB + 16,
            "num_hidden_layers": layers,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
        insert_layer_id=insert,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    model = MiniCPMV4_6ForConditionalGeneration(config)
    randomize(model, seed)
    steadied(model)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=[EOS, END], pad_token_id=PAD, do_sample=False
    )
    return model.eval()


def minicpm_tokenizer() -> Any:
    """The tiny tokenizer with the marks of MiniCPM-V's prompts."""
    tokenizer = marked_tokenizer(MARKS, ("<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def minicpm_images(**settings: Any) -> MiniCPMV4_6ImageProcessorPil:
    """The image processor that belongs to a model of this file."""
    return MiniCPMV4_6ImageProcessorPil(patch_size=PATCH, scale_resolution=EDGE, **settings)


def unpacked(given: Any) -> Any:
    """The processor's packed patches [1,3,p,P*p] as an array [P,3*p*p]."""
    packed = given["pixel_values"]
    edge = packed.shape[2]
    return packed.reshape(3, edge, -1, edge).permute(2, 0, 1, 3).flatten(1).numpy()


def save_minicpm(path: Path, **options: Any) -> Any:
    """Write a complete Hugging Face folder (options of `tiny_minicpm`) to `path`; return the model."""
    model = tiny_minicpm(**options)
    model.save_pretrained(path)
    minicpm_images().save_pretrained(path)
    minicpm_tokenizer().save_pretrained(path)
    return model


def processed(picture: Any, turns: list[dict[str, Any]], slices: bool = False) -> dict[str, Any]:
    """What transformers' own parts make of a picture and a conversation, for `generate`: its processor as a
    whole needs torchvision. With `slices` as by default, else nothing is sliced."""
    given, tokenizer = minicpm_images(slice_mode=slices)([picture], return_tensors="pt"), minicpm_tokenizer()
    owner: Any = SimpleNamespace(**MARKS, slice_mode=slices)
    block = MiniCPMV4_6Processor.replace_image_token(owner, given, 0, image_token_divisor=16)
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text.replace("<|image_pad|>", f"<image_id>0</image_id>{block}"))["input_ids"]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "pixel_values": given["pixel_values"],
        "target_sizes": given["target_sizes"],
    }
