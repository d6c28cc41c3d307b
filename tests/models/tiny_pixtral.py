"""Tiny random Mistral 3s and Pixtrals, from transformers' own config and image processor classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Ministral3Config,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from .tiny import BOS, END, EOS, PAD, VOCAB, randomize
from .tiny_split import marked_tokenizer

IMAGE, BREAK, STOP = VOCAB, VOCAB + 1, VOCAB + 2
MARKS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
PATCH, EDGE, LONGEST = 4, 2, 64
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}[IMG]"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %}[/INST]{% else %}{{ eos_token }}{% endif %}{% endfor %}"
)
# Ministral 3 scales queries by their position: here already within tiny prompts.
SCALED = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.4,
}


def tiny_mistral3(kind: str = "mistral", layers: int = 3, seed: int = 0) -> Any:
    """A random Mistral 3 in eval mode, tokens of 2 x 2 patches, its decoder "mistral" or "ministral3"; or a
    "pixtral", whose tokens are patches."""
    shared: dict[str, Any] = {
        "vocab_size": VOCAB + 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "sliding_window": None,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    scaled = {"rope_parameters": SCALED}
    text = Ministral3Config(**shared, **scaled) if kind == "ministral3" else MistralConfig(**shared)
    vision = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=PATCH,
        image_size=LONGEST,
    )
    parts = {"text_config": text, "vision_config": vision, "image_token_index": IMAGE}
    model: Any
    if kind == "pixtral":
        whole = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        model = LlavaForConditionalGeneration(LlavaConfig(**parts, **whole))
    else:
        config = Mistral3Config(**parts, spatial_merge_size=EDGE, tie_word_embeddings=False)
        model = Mistral3ForConditionalGeneration(config)
    randomize(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=[EOS, END], pad_token_id=PAD, do_sample=False
    )
    return model.eval()


def image_processor(patch: int = PATCH) -> Any:
    """The image processor that belongs to the models."""
    return PixtralImageProcessorPil(patch_size=patch, size={"longest_edge": LONGEST})


def tokenizer_of() -> Any:
    """The tiny tokenizer with the marks of rows."""
    tokenizer = marked_tokenizer(MARKS)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_mistral3(path: Path, kind: str = "mistral", **options: Any) -> Any:
    """Write a complete Hugging Face folder (options of `tiny_mistral3`) to `path`; return the model."""
    model = tiny_mistral3(kind, **options)
    model.save_pretrained(path)
    image_processor().save_pretrained(path)
    tokenizer_of().save_pretrained(path)
    own = {"processor_class": "PixtralProcessor", "patch_size": PATCH, "spatial_merge_size": EDGE}
    if kind == "pixtral":
        del own["spatial_merge_size"]
    (path / "processor_config.json").write_text(json.dumps({**own, **MARKS}))
    return model


def processed(
    pictures: list[Any], turns: list[dict[str, Any]], longest: int = LONGEST, edge: int = EDGE
) -> dict[str, Any]:
    """What transformers' own parts make of pictures and a conversation, for `generate`, if no edge may be
    longer than `longest`, and a token is `edge` patches wide: its processor as a whole needs torchvision."""
    token = PATCH * edge
    given = image_processor(token)(pictures, size={"longest_edge": longest}, return_tensors="pt")
    text = tokenizer_of().apply_chat_template(turns, tokenize=False)
    first, *rest = text.split(MARKS["image_token"])
    for (height, width), part in zip(given["image_sizes"].tolist(), rest, strict=True):
        rows = [MARKS["image_token"] * (width // token)] * (height // token)
        first += MARKS["image_break_token"].join(rows) + MARKS["image_end_token"] + part
    ids = torch.tensor([tokenizer_of()(first, add_special_tokens=False)["input_ids"]])
    return {**given, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
