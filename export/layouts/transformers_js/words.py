"""tokenizer.json, tokenizer_config.json and the chat template, so that prompts have the bundle's ids."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from vtp.engines import VtpError
from vtp.export.layouts.transformers_js.clients import Client
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.manifest import TOKENIZER
from vtp.runtime.example_input import PROMPT
from vtp.runtime.prompt.prompter import Prompt, Prompter

# LLaVA's plain form, as the prompter writes it for models without a template.
_PLAIN = (
    "{% if messages | length > 1 %}{{ raise_exception('it takes one question') }}{% endif %}USER: "
    "{% set parts = messages[0]['content'] %}"
    "{% for part in parts if part['type'] == 'image' %}{{ IMAGE + '\\n' }}{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} ASSISTANT:"
)
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def tokenizer_json(bundle: Bundle) -> str:
    """The bundle's tokenizer, which adds no BOS where the prompt's text has it already.

    The client tokenizes what a chat template made as any other text, so BOS would come twice.
    """
    data = json.loads(bundle.path(TOKENIZER).read_text(encoding="utf-8"))
    prompter, prompt = example_prompt(bundle)
    plain = prompter.tokenizer.encode(prompt.text, add_special_tokens=False).ids
    if plain == _compact(prompt, bundle) and data.get("post_processor"):
        data["post_processor"] = _without_specials(data["post_processor"])
    return json.dumps(data, ensure_ascii=False)


def tokenizer_config(bundle: Bundle, client: Client) -> dict[str, Any]:
    """What the client wants to know of the tokenizer: special tokens, and the chat template."""
    text = bundle.manifest.text
    names = {name: token for name, token in text.special_tokens.items() if name in _NAMED}
    if text.image_mark:  # Gemma 3: what stands around a picture
        end = text.image_text.partition(text.image_token)[2].strip()
        names |= {"boi_token": text.image_mark, "eoi_token": end}
    template = {"chat_template": chat_template(bundle)} if client.chat else {}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": bundle.manifest.model.max_length,
        **names,
        "image_token": text.image_token,
        **template,
    }


def chat_template(bundle: Bundle) -> str:
    """The bundle's template; LLaVA's plain form where the model has none."""
    text = bundle.manifest.text
    return text.chat_template or _PLAIN.replace("IMAGE", repr(text.image_token))


def example_prompt(bundle: Bundle) -> tuple[Prompter, Prompt]:
    """A question about one picture, as the runtime puts it."""
    prompter = Prompter(bundle.manifest.text, bundle.path(TOKENIZER))
    return prompter, prompter.encode(prompter.messages_for(PROMPT))


def check_ids(bundle: Bundle, client: Client, written: str) -> list[int]:
    """The ids of a question in transformers.js' way, with K image tokens; `written` is its tokenizer.json.

    Raises VtpError where they are not the bundle's.
    """
    _, prompt = example_prompt(bundle)
    text, keep = bundle.manifest.text, bundle.manifest.visual.keep[0]
    before, after = client.around
    wide = prompt.text.replace(text.image_token, before + text.image_token * keep + after)
    ids: list[int] = Tokenizer.from_str(written).encode(wide).ids
    wanted = [one for token in prompt.ids for one in [token] * (keep if token == text.image_token_id else 1)]
    if ids != wanted:
        raise VtpError(
            "transformers.js would give this model's prompt other tokens than the bundle's; "
            f"its processor writes {before}{text.image_token}{after} for a picture"
        )
    return ids


def _compact(prompt: Prompt, bundle: Bundle) -> list[int]:
    """The prompt's ids with a picture as its one image token, as its text has it."""
    text = bundle.manifest.text
    block = list(text.placeholder_ids)
    ids, first = list(prompt.ids), prompt.image_start - block.index(text.image_token_id)
    return [*ids[:first], text.image_token_id, *ids[first + len(block) :]]


def _without_specials(processor: dict[str, Any]) -> dict[str, Any] | None:
    """A tokenizer.json's post-processor that adds no token."""
    kind = processor["type"]
    if kind == "Sequence":
        parts = [_without_specials(part) for part in processor["processors"]]
        return {**processor, "processors": [part for part in parts if part]}
    if kind == "TemplateProcessing":
        single, pair = (
            [part for part in processor[name] if "Sequence" in part] for name in ("single", "pair")
        )
        return {**processor, "single": single, "pair": pair, "special_tokens": {}}
    return processor if kind == "ByteLevel" else None
