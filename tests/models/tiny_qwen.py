"""Tiny random Qwen-VL models from transformers' own config and processor classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .tiny import TEXT, VOCAB, randomize

# Ids are the order of this list; byte-level BPE pieces follow.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE, VIDEO = range(7)
PATCH, MERGE, TIMES = 4, 2, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": IM_END,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
VISION_CONFIG: dict[str, Any] = {
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": TIMES,
}
# Qwen3.5's: heads of which a half is turned, and every second layer attends; two value heads to a key head.
LINEAR: dict[str, Any] = {
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rope_parameters": {**TEXT_CONFIG["rope_parameters"], "partial_rotary_factor": 0.5},
}
# Config class, model class, and what differs in its vision config.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2_vl": (
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        # Windows of two by two visual tokens, and a last block that attends to everything.
        {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [2, 0, 1],
        },
    ),
    "qwen3_5": (
        "Qwen3_5Config",
        "Qwen3_5ForConditionalGeneration",
        {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "num_position_embeddings": 25,
        },
    ),
}


def tiny_qwen(
    kind: str, layers: int = 3, depth: int = 2, tied: bool = False, seed: int = 0, **vision: Any
) -> Any:
    """A random model in eval mode; `vision` goes to the tower's config, which has `depth` blocks."""
    config_class, model_class, own = KINDS[kind]
    config = getattr(transformers, config_class)(
        text_config={
            **TEXT_CONFIG,
            **({"head_dim": 16} if kind == "qwen3_vl" else {}),
            **(LINEAR if kind == "qwen3_5" else {}),
            "num_hidden_layers": layers,
            "tie_word_embeddings": tied,
        },
        vision_config={**VISION_CONFIG, **own, "depth": depth, **vision},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    model = getattr(transformers, model_class)(config)
    randomize(model, seed)
    steadied(model)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        eos_token_id=[IM_END, END_OF_TEXT], pad_token_id=END_OF_TEXT, do_sample=False
    )
    return model.eval()


def steadied(model: Any) -> None:
    """Give norms of Qwen3.5's kind weights with which float32 says something, after `randomize`.

    Of small random heads some product is nearly 0, and the norm behind it makes its rounding large: torch in
    float32 was 5e-3 from float64 in a logit.
    """
    for module in model.modules():
        if type(module).__name__ == "Qwen3_5RMSNorm":  # its weights lie around 0
            module.weight.data.sub_(1.0)
        if type(module).__name__ == "Qwen3_5RMSNormGated":
            module.weight.data.mul_(0.25)


def image_processor() -> Any:
    """The image processor that belongs to the models."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=TIMES,
        size={"shortest_edge": 64, "longest_edge": 128 * 128},
    )


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB pieces with Qwen's control tokens; there is no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(piece, special=True, normalized=False) for piece in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def save_qwen(path: Path, kind: str, **options: Any) -> Any:
    """Write a complete Hugging Face folder (options of `tiny_qwen`) to `path`; return the model."""
    model = tiny_qwen(kind, **options)
    model.save_pretrained(path)
    image_processor().save_pretrained(path)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return model


def transformers_answer(model: Any, picture: Any, before: list[int], after: list[int], steps: int) -> Any:
    """transformers' own processing of a picture between `before` and `after`, and greedy generation."""
    given = image_processor()(picture, return_tensors="pt")
    count = int(given["image_grid_thw"].prod()) // MERGE**2
    ids = torch.tensor([[*before, *[IMAGE] * count, *after]])
    model.generation_config.eos_token_id = None
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=given["pixel_values"],
        image_grid_thw=given["image_grid_thw"],
        mm_token_type_ids=(ids == IMAGE).int(),
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


def processed(pictures: list[Any], turns: list[dict[str, Any]]) -> dict[str, Any]:
    """What transformers' own parts make of pictures and a conversation, for `generate`: its processor as a
    whole needs torchvision."""
    given, tokenizer = image_processor()(pictures, return_tensors="pt"), qwen_tokenizer()
    text = tokenizer.apply_chat_template(
        turns, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, tokenize=False
    )
    counts = iter((given["image_grid_thw"].prod(dim=1) // MERGE**2).tolist())
    ids = torch.tensor([[item for piece in tokenizer(text)["input_ids"] for item in _wide(piece, counts)]])
    kinds = {"attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int()}
    return {**given, "input_ids": ids, **kinds}


def _wide(piece: int, counts: Iterator[int]) -> list[int]:
    return [IMAGE] * next(counts) if piece == IMAGE else [piece]
