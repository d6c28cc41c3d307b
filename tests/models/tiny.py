"""Tiny random LLaVAs made from transformers' own config classes: whole models in milliseconds.

The weights are drawn wide enough that attention is peaked and logits are apart: with the library's
default initialisation everything is nearly constant, and a wrong position or mask would not show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

# Ids are the order of this list; byte-level BPE pieces follow.
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<end>"]
BOS, EOS, PAD, IMAGE, END = 1, 2, 3, 4, 5
VOCAB = 384

TEXT = [
    "what shape is the red ? what color is the star ? how many circle ? where is the blue ?",
    "USER: <image>\nDescribe the picture. ASSISTANT: a red star and two blue circles on the left.",
    "naïve café, 你好世界, 🙂 emoji; numbers 0123456789.",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: "
    "{% else %}{{ message['role'] | upper }}: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>\n"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

DECODERS: dict[str, Any] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {"use_sliding_window": False}),
    "qwen3": (Qwen3Config, {"use_sliding_window": False}),
}


def text_config(
    decoder: str, heads: int, kv_heads: int, layers: int, head_dim: int, tied: bool, **changes: Any
) -> Any:
    """Config of a tiny decoder; qwen2 has biases on q, k and v."""
    config_class, extra = DECODERS[decoder]
    width = heads * head_dim
    return config_class(
        **{
            "vocab_size": VOCAB,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": tied,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            **extra,
            **changes,
        }
    )


def vision_config(vision: str, image_size: int, patch: int, layers: int) -> Any:
    """Config of a tiny tower, 32 wide with 4 heads: "clip" (with CLS) or "siglip" (without)."""
    config_class = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[vision]
    extra = {} if vision == "clip" else {"vision_use_head": False}
    return config_class(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch,
        **extra,
    )


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter: matrices at about unit gain, norms near 1, biases away from 0."""
    generator = torch.Generator().manual_seed(seed)
    tied = {id(model.get_output_embeddings().weight)}  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "embedding" in name or "embed_tokens" in name or id(parameter) in tied:
            value = noise * 0.5
        elif parameter.ndim >= 2:
            value = noise * 1.4 / parameter[0].numel() ** 0.5
        else:
            value = noise * 0.1 + (0.0 if name.endswith("bias") else 1.0)
        parameter.data.copy_(value)


def tiny_llava(
    decoder: str = "llama",
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = False,
    image_size: int = 56,
    patch: int = 14,
    vision_layers: int = 3,
    layers: int = 4,
    head_dim: int = 8,
    seed: int = 0,
    vision: str = "clip",
    dtype: torch.dtype = torch.float32,
    **text_changes: Any,
) -> LlavaForConditionalGeneration:
    """A random LLaVA in eval mode: a grid of (image_size // patch)² visual tokens (16 by default).

    `decoder` is "llama", "mistral" or "qwen2" (biases on q, k, v), `vision` "clip" or "siglip";
    `text_changes` go to the decoder's config (attention_bias=True, rope_theta=…).
    """
    grid = image_size // patch
    config = LlavaConfig(
        vision_config=vision_config(vision, image_size, patch, vision_layers),
        text_config=text_config(decoder, heads, kv_heads, layers, head_dim, tied, **text_changes),
        image_token_index=IMAGE,
        image_seq_length=grid * grid,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        tie_word_embeddings=tied,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlavaForConditionalGeneration(config)
    randomize(model, seed)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=[EOS, END], pad_token_id=PAD, do_sample=False
    )
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB pieces trained on three lines; adds BOS in front, as Llama's does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(piece, special=True, normalized=False) for piece in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


def tiny_processor(image_size: int, patch: int, vision: str = "clip") -> LlavaProcessor:
    """Processor that resizes the short side to `image_size`, crops the centre and expands placeholders."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
        tokenizer=tiny_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        num_additional_image_tokens=1 if vision == "clip" else 0,
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny(path: str | Path, **options: Any) -> LlavaForConditionalGeneration:
    """Write a complete Hugging Face folder (options of `tiny_llava`) to `path`; return the model.

    It holds config.json, model.safetensors, generation_config.json, tokenizer.json,
    tokenizer_config.json, chat_template.jinja, processor_config.json and preprocessor_config.json.
    """
    folder = Path(path)
    model = tiny_llava(**options)
    model.save_pretrained(folder)
    processor = tiny_processor(
        options.get("image_size", 56), options.get("patch", 14), options.get("vision", "clip")
    )
    processor.save_pretrained(folder)
    preprocessor = folder / "preprocessor_config.json"  # newer versions fold it into processor_config.json
    if not preprocessor.exists():
        preprocessor.write_text(json.dumps(processor.image_processor.to_dict(), indent=2, default=str))
    return model


def prompt_ids(count: int, before: int = 2, after: int = 5, seed: int = 0) -> torch.Tensor:
    """input_ids [1,T]: BOS, `before` random text ids, `count` image placeholders, `after` more text ids."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(len(SPECIAL), VOCAB, (before + after,), generator=generator).tolist()
    return torch.tensor([[BOS, *text[:before], *[IMAGE] * count, *text[before:]]])


def pixels(image_size: int = 56, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random pixel_values [1,3,image_size,image_size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, image_size, image_size, generator=generator).to(dtype)
