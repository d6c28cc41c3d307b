"""The built-in model's Hugging Face folder: tokenizer, chat template, processor, configuration, weights."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vtp.engines import UsageError
from vtp.engines.disk.whole import whole_folder
from vtp.scenes.generator.pictures import COLORS, SHAPES
from vtp.scenes.generator.signs import ALPHABET
from vtp.scenes.training.chat import CHAT_TEMPLATE

SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
PAD, BOS, EOS, IMAGE = range(4)
VOCABULARY = 512
_GRAMMAR = (
    "what how many where is the shape color are there a an and or not in on of picture "
    "top bottom left right northwest northeast southwest southeast "
    "0 1 2 3 4 5 6 7 8 9 you it this please hello yes no ? . , !"
)


@dataclass(frozen=True)
class Form:
    """Sizes in which the built-in models differ, and whether their tokenizer knows the words of signs.

    `tower_layers` counts the last one, which is never used; `decoder_layers` those that are trained.
    """

    tower_layers: int = 5
    tower_mlp: int = 512
    decoder_layers: int = 4
    decoder_mlp: int = 384
    reads: bool = False


SHIPPED = Form()


def build_tokenizer(reads: bool = False) -> Tokenizer:
    """The tokenizer; with `reads` also with " sign" and " C" and its like as tokens, behind all others."""
    return _with_signs(_key_words()) if reads else _key_words()


def _with_signs(tokenizer: Tokenizer) -> Tokenizer:
    """Merges of lowest priority: what was one token, or several, stays what it was."""
    data = json.loads(tokenizer.to_str())
    steps = [("Ġs", "i"), ("g", "n"), ("Ġsi", "gn"), *(("Ġ", c) for c in ALPHABET if c.isalpha())]
    for left, right in steps:
        data["model"]["merges"].append([left, right])
        data["model"]["vocab"][left + right] = len(data["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(data))


def _key_words() -> Tokenizer:
    """Byte-level BPE in which every key word is one token, with or without a blank before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    corpus = [f" {word}" for word in (*SHAPES, *COLORS, *_GRAMMAR.split())] * 2 + [
        "what",
        "how",
        "where",
        "USER",
        " USER",
        "ASSISTANT",
        " ASSISTANT",
    ]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def build_processor(reads: bool = False) -> LlavaProcessor:
    """LLaVA's processor: the CLIP image processor at 336 pixels, the tokenizer, the chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(reads),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_config(form: Form = SHIPPED) -> LlavaConfig:
    """CLIP tower (the last layer unused: feature layer -2) and Llama decoder of that form, 128 wide."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=form.tower_mlp,
        num_hidden_layers=form.tower_layers,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
        projection_dim=128,
        attention_dropout=0.0,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=form.decoder_mlp,
        num_hidden_layers=form.decoder_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = PAD, BOS, EOS
    return config


def build_model(seed: int = 0, form: Form = SHIPPED) -> LlavaForConditionalGeneration:
    """A randomly initialised model, wider than transformers' 0.02: binding takes far longer from there."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(form))
    decoder = model.model.language_model
    torch.nn.init.normal_(decoder.embed_tokens.weight, std=0.5)
    for name, weight in decoder.layers.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(
                weight, std=0.04 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.09
            )
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False
    )
    return model


def save(model: LlavaForConditionalGeneration, folder: Path, reads: bool = False) -> None:
    """Write the model folder whole, in the place of one that is there: readers see the old or the new.

    Raises UsageError for a folder of something else.
    """
    with whole_folder(folder, lambda: _check_replaceable(folder)) as aside:
        model.save_pretrained(aside)
        build_processor(reads).save_pretrained(aside)
        for file in aside.iterdir():
            file.chmod(0o644)


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds no model, so it is left alone; choose another folder")
