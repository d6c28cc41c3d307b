"""Tiny random PaliGemmas and Gemma 3s, from transformers' own config, tokenizer and processor classes."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaTokenizer,
    GenerationConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .tiny import randomize

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["<start_of_image>", "<end_of_image>", "<image_soft_token>", "<image>"]
PAD, EOS, BOS, TURN_END, BOI, EOI, SOFT, IMAGE = 0, 1, 2, 6, 7, 8, 9, 10
# Runs of line ends are single tokens in Gemma's vocabulary, so that "\n" + "\n\n" is another token than both.
LINES = {"\n" * count: ("\n" * (count - 1), "\n") for count in range(2, 6)}
VOCAB = 384

# Gemma 3's, but for its checks of the turns' order.
GEMMA3_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def gemma_tokenizer(**named: str) -> GemmaTokenizer:
    """Characters, bytes and runs of line ends; `named` are further special tokens (image_token=...)."""
    letters = "▁" + string.ascii_letters + string.digits + string.punctuation
    pieces = [*SPECIAL, "\n", *LINES, *(f"<0x{value:02X}>" for value in range(256)), *letters]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return GemmaTokenizer(vocab=vocab, merges=list(LINES.values()), extra_special_tokens=named)


def _vision(image_size: int, patch: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch,
        vision_use_head=False,
    )


def _text(layers: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def _finish(model: Any, seed: int, ends: list[int]) -> Any:
    """Wide weights, Gemma's norms around 0 as their 1 + weight wants; greedy generation."""
    randomize(model, seed)
    for module in model.modules():
        if type(module).__name__.startswith("Gemma") and type(module).__name__.endswith("RMSNorm"):
            module.weight.data.sub_(1.0)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=ends, pad_token_id=PAD, do_sample=False
    )
    return model.eval()


def tiny_paligemma(decoder: str = "gemma", layers: int = 3, seed: int = 0) -> Any:
    """A random PaliGemma of 16 visual tokens; "gemma2" bends logits hard and has a window of 128."""
    text: Any = GemmaConfig(**_text(layers, 1))
    if decoder == "gemma2":
        bent = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 5}
        text = Gemma2Config(**_text(layers, 2), **bent, sliding_window=128)
    config = PaliGemmaConfig(
        vision_config=_vision(56, 14),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return _finish(PaliGemmaForConditionalGeneration(config), seed, [EOS])


def tiny_gemma3(layers: int = 4, seed: int = 0) -> Any:
    """A random Gemma 3 of 64 patches in 16 visual tokens, with windows of 12 and two rotary embeddings."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    text = Gemma3TextConfig(
        **_text(layers, 2),
        sliding_window=12,
        layer_types=(kinds * layers)[:layers],
        query_pre_attn_scalar=10,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    )
    config = Gemma3Config(
        vision_config=_vision(56, 7),
        text_config=text,
        mm_tokens_per_image=16,
        boi_token_index=BOI,
        eoi_token_index=EOI,
        image_token_index=SOFT,
    )
    return _finish(Gemma3ForConditionalGeneration(config), seed, [EOS, TURN_END])


def processor_of(model: Any) -> Any:
    """The processor that belongs to a model of this file."""
    size = {"height": 56, "width": 56}
    if model.config.model_type == "paligemma":
        images = SiglipImageProcessorPil(size=size)
        images.image_seq_length = 16
        return PaliGemmaProcessor(images, gemma_tokenizer(image_token="<image>"))
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>"}
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size=size),
        gemma_tokenizer(**named, eoi_token="<end_of_image>"),
        chat_template=GEMMA3_TEMPLATE,
        image_seq_length=16,
    )


def save_gemma(path: Path, model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Write a complete Hugging Face folder to `path`; returns the model."""
    model.to(dtype).save_pretrained(path)
    processor = processor_of(model)
    processor.save_pretrained(path)
    processor.image_processor.save_pretrained(path)
    return model
