"""Tiny random LFM2-VLs from transformers' own config and processor classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import (
    GenerationConfig,
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlProcessor,
)
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig

from ..stand_ins.torch_resizing import lfm2_image_processor
from .tiny import BOS, END, EOS, IMAGE, PAD, VOCAB, randomize
from .tiny_split import marked_tokenizer

PATCH, FACTOR = 4, 2
MARKS = {
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail_token": "<|img_thumbnail|>",
}
_TILES = tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))
# The form of the published models' own.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What the image processor's file says; sizes are in visual tokens of 8 x 8 pixels.
IMAGES: dict[str, Any] = {
    "image_processor_type": "Lfm2VlImageProcessorFast",
    "processor_class": "Lfm2VlProcessor",
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "encoder_patch_size": PATCH,
    "downsample_factor": FACTOR,
    "do_image_splitting": True,
    "min_tiles": 2,
    "max_tiles": 10,
    "use_thumbnail": True,
    "min_image_tokens": 4,
    "max_image_tokens": 24,
    "tile_size": 32,
    "max_pixels_tolerance": 2.0,
    "do_pad": True,
    "size": {"height": 32, "width": 32},
}


def tiny_lfm2(
    kinds: str = "cacca",
    vision_layers: int = 2,
    seed: int = 0,
    kernel: int = 3,
    conv_bias: bool = False,
    layernorm: bool = True,
    side: int = 4,
) -> Any:
    """A random LFM2-VL in eval mode; `kinds` has a letter for each layer: convolution or attention.

    side  of the square table of places that its tower learned
    """
    config = Lfm2VlConfig(
        vision_config=Siglip2VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            num_patches=side * side,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=Lfm2Config(
            vocab_size=VOCAB + 32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=len(kinds),
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            conv_L_cache=kernel,
            conv_bias=conv_bias,
            block_multiple_of=8,
            layer_types=["conv" if kind == "c" else "full_attention" for kind in kinds],
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        image_token_id=IMAGE,
        projector_hidden_size=48,
        projector_use_layernorm=layernorm,
        downsample_factor=FACTOR,
    )
    model = Lfm2VlForConditionalGeneration(config)
    randomize(model, seed)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=[EOS, END], pad_token_id=PAD, do_sample=False
    )
    return model.eval()


def lfm2_tokenizer() -> Any:
    """The tiny tokenizer with the marks of LFM2-VL's prompts."""
    tokenizer = marked_tokenizer(MARKS, ("<|im_start|>", "<|im_end|>", *_TILES))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_lfm2(path: Path, **options: Any) -> Any:
    """Write a complete Hugging Face folder (options of `tiny_lfm2`) to `path`; return the model."""
    model = tiny_lfm2(**options)
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(IMAGES, indent=2))
    lfm2_tokenizer().save_pretrained(path)
    return model


def unpadded(given: Any) -> Any:
    """The processor's pixel_values [V,most,values] without what fills views up: [P,values]."""
    return given["pixel_values"][given["pixel_attention_mask"].bool()]


class PictureProcessor(Lfm2VlProcessor):
    """LFM2-VL's processor, whose image processor may be of any class."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return (
            type(argument)
            if argument_name == "image_processor"
            else super().check_argument_for_proper_class(argument_name, argument)
        )


def lfm2_processor(**changes: Any) -> Lfm2VlProcessor:
    """The processor that belongs to a model of this file, with changes of its image processor's settings."""
    settings = {name: value for name, value in IMAGES.items() if not name.endswith(("_type", "_class"))}
    images = lfm2_image_processor(**{**settings, **changes})
    return PictureProcessor(images, lfm2_tokenizer(), chat_template=TEMPLATE)
