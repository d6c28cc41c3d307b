"""Small tokenizers of every kind, chat templates and turns, for tests of prompts and of their answers."""

import json
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from vtp.runtime.prompt.prompter import TextSpec

SPECIALS = [
    AddedToken(text, special=True, normalized=False) for text in ("<pad>", "<s>", "</s>", "<image>", "<unk>")
]
IMAGE = 3
CORPUS = [
    "what color is the star ? the star is red, and it's a small one.",
    "USER: how many circles ? ASSISTANT: there are 12 circles (I don't see more)!",
    "naïve café — déjà vu, 東京 и Москва; emoji 🙂 and 👩‍👩‍👧 too\nnew line\ttab",
] * 3
LLAVA_TEMPLATE = """
{%- for message in messages -%}
    {%- if message['role'] != 'system' -%}{{- message['role'].upper() + ': ' -}}{%- endif -%}
    {# Render all images first #}
    {%- for content in message['content'] | selectattr('type', 'equalto', 'image') -%}
        {{- '<image>\n' -}}
    {%- endfor -%}
    {# Render all text next #}
    {%- for content in message['content'] | selectattr('type', 'equalto', 'text') -%}
        {%- if message['role'] != 'assistant' -%}
            {{- content['text'] + ' ' -}}
        {%- else -%}
            {%- generation -%}{{- content['text'] + ' ' -}}{%- endgeneration -%}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"""  # as in the llava-hf models, indented
TEMPLATES = {
    "llava": LLAVA_TEMPLATE,
    "with_bos": "{{ bos_token }}" + LLAVA_TEMPLATE,
    "ends_each_turn": LLAVA_TEMPLATE.replace("{%- if add_gen", "{{- eos_token -}}{%- if add_gen"),
}


def train(trainer: Any, tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level(use_prefix: bool = False) -> Tokenizer:
    """GPT-2 style: every byte has a token, words merge over them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=use_prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        ),
        tokenizer,
    )


def llama() -> Tokenizer:
    """Llama 2 style: SentencePiece pieces, byte tokens for what the vocabulary lacks."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    alphabet = sorted(set("▁abcdefghijklmnopqrstuvwxyzUSERAINT?:.,"))
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet, limit_alphabet=len(alphabet),
        show_progress=False,
    )  # fmt: skip
    train(trainer, tokenizer)
    return with_pieces(tokenizer, [*bytes_, "▁", "▁▁", "▁▁▁"])


def with_pieces(tokenizer: Tokenizer, pieces: list[str]) -> Tokenizer:
    """The same BPE tokenizer with more pieces in its vocabulary, as SentencePiece models have them."""
    data = json.loads(tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    for piece in pieces:
        vocabulary.setdefault(piece, len(vocabulary))
    return Tokenizer.from_str(json.dumps(data))


def metaspace(scheme: str = "first") -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    return train(trainer, tokenizer)


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return train(
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIALS, show_progress=False), tokenizer
    )


def end_of_word() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIALS, end_of_word_suffix="</w>", show_progress=False
    )
    return train(trainer, tokenizer)


def words_only() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return train(trainers.WordLevelTrainer(special_tokens=SPECIALS, show_progress=False), tokenizer)


def rewriting() -> Tokenizer:
    """A decoder that replaces across tokens, so no text is certain before the end."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("is", "IS")])
    return tokenizer


TOKENIZERS = {
    "byte_level": byte_level(),
    "byte_level_prefix": byte_level(use_prefix=True),
    "llama": llama(),
    "metaspace_first": metaspace(),
    "metaspace_always": metaspace("always"),
    "metaspace_never": metaspace("never"),
    "wordpiece": wordpiece(),
    "end_of_word": end_of_word(),
    "words_only": words_only(),
    "rewriting": rewriting(),
}
GROWING = sorted(set(TOKENIZERS) - {"rewriting"})


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """transformers' view of a tokenizer, from its own copy."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


FAST = {name: wrapped(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def spec_for(template: str | None, placeholders: tuple[int, ...] = (IMAGE,)) -> TextSpec:
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return TextSpec(template, "<image>", IMAGE, placeholders, 1, (2,), special)


def user(*parts: str) -> dict[str, Any]:
    """A user turn; "IMAGE" stands for the image."""
    return {"role": "user", "content": [part_for(part) for part in parts]}


def part_for(part: str) -> dict[str, str]:
    return {"type": "image"} if part == "IMAGE" else {"type": "text", "text": part}


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
