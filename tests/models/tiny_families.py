"""Tiny random models of other families, from transformers' own config and processor classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

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

VIDEO = 0  # an id that no test uses
# Resolutions in tiles of one view.
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]


def tiny_anyres(
    kind: str,
    decoder: str = "llama",
    vision: str = "clip",
    image_size: int = 28,
    patch: int = 7,
    layers: int = 3,
    vision_layers: int = 2,
    seed: int = 0,
) -> Any:
    """A random "llava_next" or "llava_onevision" in eval mode, of views of (image_size // patch)² patches."""
    side = image_size // patch
    points = [[rows * image_size, columns * image_size] for rows, columns in GRIDS]
    shared: dict[str, Any] = {
        "vision_config": vision_config(vision, image_size, patch, vision_layers),
        "text_config": text_config(decoder, 4, 2, layers, 8, False),
        "image_token_index": IMAGE,
        "image_grid_pinpoints": points,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    model: Any
    if kind == "llava_next":
        strategy = "default" if vision == "clip" else "full"
        config = LlavaNextConfig(
            **shared, image_seq_length=side * side, vision_feature_select_strategy=strategy
        )
        model = LlavaNextForConditionalGeneration(config)
    else:
        model = LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(**shared, video_token_index=VIDEO)
        )
    randomize(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=[EOS, END], pad_token_id=PAD, do_sample=False
    )
    return model.eval()


def image_processor(model: Any) -> Any:
    """The image processor that belongs to a model of `tiny_anyres`."""
    size, points = model.config.vision_config.image_size, model.config.image_grid_pinpoints
    if model.config.model_type == "llava_next":
        square = {"height": size, "width": size}
        return LlavaNextImageProcessorPil(
            size={"shortest_edge": size}, crop_size=square, image_grid_pinpoints=points
        )
    return LlavaOnevisionImageProcessorPil(size={"height": size, "width": size}, image_grid_pinpoints=points)


def save_anyres(path: Path, kind: str, **options: Any) -> Any:
    """Write a complete Hugging Face folder (options of `tiny_anyres`) to `path`; return the model."""
    model = tiny_anyres(kind, **options)
    model.save_pretrained(path)
    image_processor(model).save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return model


def packed(model: Any, features: torch.Tensor, image_size: tuple[int, int], lines: bool) -> torch.Tensor:
    """transformers' packing of one picture's views [V,n,C]: [P,C], or with ends of lines, zeros, [N,C]."""
    extra: dict[str, Any] = {"image_newline": torch.zeros(features.shape[-1]) if lines else None}
    if hasattr(model.config, "vision_aspect_ratio"):
        extra["vision_aspect_ratio"] = model.config.vision_aspect_ratio
    else:
        extra["vision_feature_select_strategy"] = model.config.vision_feature_select_strategy
    tokens, _ = model.model.pack_image_features([features], torch.tensor([image_size]), **extra)
    return tokens[0]
