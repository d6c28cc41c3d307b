"""Tiny random models that see a picture in tiles: InternVL, Idefics3, SmolVLM; transformers' own classes.

Their tokenizer is the tiny one with the marks of the family's prompts behind its pieces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from .tiny import BOS, END, EOS, IMAGE, PAD, VOCAB, randomize, text_config, tiny_tokenizer

INTERNVL_MARKS = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
    "turn_token": "<|im_start|>",
    "over_token": "<|im_end|>",
}
# The form of the published models' own: the picture is one IMG_CONTEXT and a line end.
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def marked_tokenizer(marks: dict[str, str], more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with marks that it knows by name, and more that it does not."""
    plain = tiny_tokenizer()
    plain.add_special_tokens({"extra_special_tokens": [*marks.values(), *more]})
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=marks,
        clean_up_tokenization_spaces=False,
    )


def tiny_internvl(
    decoder: str = "qwen2",
    layers: int = 3,
    vision_layers: int = 2,
    seed: int = 0,
    head_dim: int = 8,
    feature_layer: int = -1,
    **vision: Any,
) -> Any:
    """A random InternVL in eval mode: views of 4 x 4 patches, which become 2 x 2 tokens."""
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            **{
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": vision_layers,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 7,
                **vision,
            }
        ),
        text_config=text_config(decoder, 4, 2, layers, head_dim, False, vocab_size=VOCAB + 16),
        image_token_id=VOCAB,
        image_seq_length=4,
        vision_feature_layer=feature_layer,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    randomize(model, seed)
    for name, parameter in model.named_parameters():
        if "lambda_" in name:  # layer scales: near the 0.1 that they start from, and unlike one another
            parameter.data.mul_(0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=[EOS, END], pad_token_id=PAD, do_sample=False
    )
    return model.eval()


class PictureProcessor(InternVLProcessor):
    """InternVL's processor without its part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def internvl_processor(model: Any, image_size: tuple[int, int]) -> InternVLProcessor:
    """The processor that belongs to a model of `tiny_internvl`; at most four tiles."""
    del image_size  # it looks at each picture
    height, width = model.config.vision_config.image_size
    return PictureProcessor(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": height, "width": width}, crop_to_patches=True, max_patches=4
        ),
        tokenizer=marked_tokenizer(INTERNVL_MARKS),
        image_seq_length=model.config.image_seq_length,
        chat_template=INTERNVL_TEMPLATE,
    )


def save_internvl(path: Path, **options: Any) -> Any:
    """Write a complete Hugging Face folder (options of `tiny_internvl`) to `path`; return the model."""
    model = tiny_internvl(**options)
    model.save_pretrained(path)
    processor = internvl_processor(model, (0, 0))
    processor.image_processor.save_pretrained(path)
    processor.tokenizer.chat_template = INTERNVL_TEMPLATE
    processor.tokenizer.save_pretrained(path)
    return model


IDEFICS3_MARKS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
_ROWS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))


def tiny_idefics3(
    kind: str = "idefics3",
    decoder: str = "llama",
    layers: int = 3,
    vision_layers: int = 2,
    seed: int = 0,
    head_dim: int = 8,
    factor: int = 2,
    side: int = 4,
    tied: bool = False,
) -> Any:
    """A random "idefics3" or "smolvlm" in eval mode: tiles of side x side patches, factor² to a token."""
    shared: dict[str, Any] = {
        "text_config": text_config(decoder, 4, 2, layers, head_dim, tied, vocab_size=VOCAB + 32),
        "image_token_id": IMAGE,
        "scale_factor": factor,
        "tie_word_embeddings": tied,
        "pad_token_id": PAD,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": 4,
        "image_size": 7 * side,
        "patch_size": 7,
    }
    model: Any
    if kind == "idefics3":
        model = Idefics3ForConditionalGeneration(
            Idefics3Config(**shared, vision_config=Idefics3VisionConfig(**vision))
        )
    else:
        model = SmolVLMForConditionalGeneration(
            SmolVLMConfig(**shared, vision_config=SmolVLMVisionConfig(**vision))
        )
    randomize(model, seed)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=[EOS, END], pad_token_id=PAD, do_sample=False
    )
    return model.eval()


def idefics3_processor(model: Any, image_size: tuple[int, int]) -> Idefics3Processor:
    """The processor of a model of `tiny_idefics3`, for pictures of an image size.

    SmolVLM's own processor needs packages for videos; for pictures it does what Idefics3's does.
    """
    tile = model.config.vision_config.image_size
    kind = Idefics3ImageProcessorPil if model.config.model_type == "idefics3" else SmolVLMImageProcessorPil
    return Idefics3Processor(
        image_processor=kind(size={"longest_edge": max(image_size)}, max_image_size={"longest_edge": tile}),
        tokenizer=marked_tokenizer(IDEFICS3_MARKS, _ROWS),
        image_seq_len=(tile // 7 // model.config.scale_factor) ** 2,
        chat_template=DEFAULT_CHAT_TEMPLATE.replace("<|im_start|>", "<s>"),
    )


def save_idefics3(path: Path, **options: Any) -> Any:
    """Write a complete Hugging Face folder (options of `tiny_idefics3`) to `path`; return the model."""
    model = tiny_idefics3(**options)
    model.save_pretrained(path)
    tile = model.config.vision_config.image_size
    processor = idefics3_processor(model, (2 * tile, 2 * tile))
    processor.save_pretrained(path)
    return model
