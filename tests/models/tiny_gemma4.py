"""Tiny random Gemma 4s, from transformers' own config, tokenizer and image processor classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4Processor,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    GenerationConfig,
)
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from .tiny import randomize
from .tiny_gemma import BOI, BOS, EOI, EOS, GEMMA3_TEMPLATE, PAD, SOFT, TURN_END, gemma_tokenizer

# Its processor puts the marks around the image token, which the template writes.
TEMPLATE = GEMMA3_TEMPLATE.replace("<start_of_image>", "<image_soft_token>")
PATCH, EDGE, BUDGET = 4, 3, 70
NAMED = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
NAMED |= {"audio_token": "<audio>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}
# Smaller ones have an input for every layer and share keys and values; larger ones look ahead in windows.
SMALL: dict[str, Any] = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 512,
    "use_double_wide_mlp": True,
}
LARGE: dict[str, Any] = {
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "use_bidirectional_attention": "vision",
    "final_logit_softcapping": 4.0,
}
KINDS = {"s": "sliding_attention", "f": "full_attention"}
LAYERS = {"short": "sff", "small": "sssfsf", "large": "sfsf"}  # the last, or last two, of smaller ones share


def tiny_gemma4(kind: str = "small", seed: int = 0) -> Any:
    """A random Gemma 4 of 64 visual tokens of 9 patches, with windows of 40 and two rotary embeddings."""
    large = kind == "large"
    layers = [KINDS[letter] for letter in LAYERS[kind]]
    text = Gemma4TextConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=32,
        max_position_embeddings=512,
        sliding_window=40,
        layer_types=layers,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        rope_parameters={
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 5000.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        **(LARGE if large else {**SMALL, "num_kv_shared_layers": 1 if kind == "short" else 2}),
    )
    vision = Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        patch_size=PATCH,
        position_embedding_size=64,
        pooling_kernel_size=EDGE,
        use_clipped_linears=not large,
        standardize=large,
    )
    config = Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        boi_token_id=BOI,
        eoi_token_id=EOI,
        image_token_id=SOFT,
        video_token_id=509,
        audio_token_id=510,
    )
    model: Any = Gemma4ForConditionalGeneration(config)
    randomize(model, seed)
    _fill_buffers(model, seed)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=[EOS, TURN_END], pad_token_id=PAD, do_sample=False
    )
    return model.eval()


def _fill_buffers(model: Any, seed: int) -> None:
    """What checkpoints hold beside parameters: bounds, scales of layers, means of features."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        drawn = torch.rand(buffer.shape, generator=generator)
        if name.endswith(("_min", "_max")):
            buffer.copy_((1.0 + drawn) * (-1.0 if name.endswith("_min") else 1.0))
        elif name.endswith(("layer_scalar", "std_scale")):
            buffer.copy_(0.5 + drawn)
        elif name.endswith("std_bias"):
            buffer.copy_(drawn - 0.5)


def image_processor() -> Any:
    """The image processor that belongs to the models."""
    return Gemma4ImageProcessorPil(patch_size=PATCH, pooling_kernel_size=EDGE, max_soft_tokens=BUDGET)


def tokenizer_of() -> Any:
    """Gemma's tokenizer with the marks of pictures."""
    tokenizer = gemma_tokenizer(**NAMED)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_gemma4(path: Path, *args: Any, **options: Any) -> Any:
    """Write a complete Hugging Face folder (options of `tiny_gemma4`) to `path`; returns the model."""
    model = tiny_gemma4(*args, **options)
    model.save_pretrained(path)
    image_processor().save_pretrained(path)
    tokenizer_of().save_pretrained(path)
    return model


class PictureProcessor(Gemma4Processor):
    """Gemma 4's processor without its parts for videos, which need torchvision, and sound."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name in ("video_processor", "feature_extractor"):
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def processor_of() -> Gemma4Processor:
    """The processor that belongs to the models."""
    return PictureProcessor(None, image_processor(), tokenizer_of(), None, chat_template=TEMPLATE)


def processed(pictures: list[Any], turns: list[dict[str, Any]]) -> dict[str, Any]:
    """What transformers' own processor makes of pictures and a conversation, for `generate`."""
    processor = processor_of()
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    given = processor(images=[pictures], text=[text], add_special_tokens=False, return_tensors="pt")
    return {name: value for name, value in given.items() if not name.startswith("num_")}
