"""Prompts, streamed text and stop strings equal what transformers makes of the same words and ids."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
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
from transformers import AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils.chat_template_utils import render_jinja_template

import vtp.scenes
from vtp.engines.errors import UsageError, VtpError
from vtp.runtime.prompt.prompter import Detokenizer, Prompter, StopStrings, TextSpec

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every tokenizer as <name>.json, padding and truncation saved in them."""
    path = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in TOKENIZERS.items():
        copy = Tokenizer.from_str(tokenizer.to_str())
        copy.enable_padding(length=64)
        copy.enable_truncation(4)
        copy.save(str(path / f"{name}.json"))
    return path


def user(*parts: str) -> dict[str, Any]:
    """A user turn; "IMAGE" stands for the image."""
    return {"role": "user", "content": [part_for(part) for part in parts]}


def part_for(part: str) -> dict[str, str]:
    return {"type": "image"} if part == "IMAGE" else {"type": "text", "text": part}


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


CONVERSATIONS = {
    "one_turn": [user("IMAGE", "what color is the star ?")],
    "text_first": [user("Look:", "IMAGE", "naïve 東京 🙂 — how many\n\n circles ? ")],
    "system": [said("system", "You answer in one word."), user("IMAGE", "what is it ?")],
    "image_first_turn": [user("IMAGE", "what is it ?"), said("assistant", "a star"), user("and its color ?")],
    "image_later_turn": [user("hello"), said("assistant", "hi"), user("IMAGE", "what is it ?")],
    "image_alone": [user("IMAGE"), said("assistant", "a star"), user("  which color?")],
}


def oracle_ids(processor: LlavaProcessor, messages: list[dict[str, Any]]) -> list[int]:
    """Ids from transformers with an image, the run of its placeholders shrunk to one."""
    picture = {"type": "image", "image": Image.new("RGB", (40, 30))}
    with_image = [
        {**turn, "content": [picture if part["type"] == "image" else part for part in turn["content"]]}
        for turn in messages
    ]
    out: Any = processor.apply_chat_template(
        with_image, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    ids = np.asarray(out["input_ids"]).reshape(-1).tolist()
    count = ids.count(IMAGE)
    assert count > 1
    first = ids.index(IMAGE)
    assert ids[first : first + count] == [IMAGE] * count
    return ids[: first + 1] + ids[first + count :]


def processor_for(name: str, template: str) -> LlavaProcessor:
    size = {"height": 28, "width": 28}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=wrapped(TOKENIZERS[name]), patch_size=14, vision_feature_select_strategy="default",
        chat_template=template, num_additional_image_tokens=1,
    )  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["byte_level", "llama", "metaspace_first", "wordpiece"])
def test_prompts_equal_transformers(name: str, template: str, folder: Path) -> None:
    processor = processor_for(name, TEMPLATES[template])
    prompter = Prompter(spec_for(TEMPLATES[template]), folder / f"{name}.json")
    for messages in CONVERSATIONS.values():
        prompt = prompter.encode(messages)
        assert prompt.text == processor.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt.ids == oracle_ids(processor, messages)
        assert prompt.ids[prompt.image_start] == IMAGE
        assert prompt.ids.count(1) == 1 and prompt.ids[0] == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    question=st.text(min_size=1, max_size=40),
    name=st.sampled_from(["byte_level", "llama", "metaspace_first"]),
)
def test_any_question_has_transformers_ids(question: str, name: str, folder: Path) -> None:
    if not question.strip():
        return
    prompter = Prompter(spec_for(LLAVA_TEMPLATE), folder / f"{name}.json")
    prompt = prompter.encode(prompter.messages_for(question))
    text = f"USER: <image>\n{question} ASSISTANT:"
    assert prompt.text == text
    assert prompt.ids == FAST[name](text)["input_ids"]


def test_the_built_in_model_is_prompted_as_by_its_own_processor() -> None:
    model = vtp.scenes.model_dir()
    processor = AutoProcessor.from_pretrained(model, use_fast=False)
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    spec = TextSpec(template, "<image>", processor.image_token_id, (processor.image_token_id,), 1, (2,),
                    dict(processor.tokenizer.special_tokens_map))  # fmt: skip
    prompter = Prompter(spec, model / "tokenizer.json")
    assert processor.image_token_id == IMAGE
    for messages in CONVERSATIONS.values():
        prompt = prompter.encode(messages)
        assert prompt.text == processor.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt.ids == oracle_ids(processor, messages)


def test_several_placeholders_take_the_images_place(folder: Path) -> None:
    one = Prompter(spec_for(LLAVA_TEMPLATE), folder / "byte_level.json")
    three = Prompter(spec_for(LLAVA_TEMPLATE, (7, IMAGE, 8)), folder / "byte_level.json")
    short, long = (prompter.encode(CONVERSATIONS["one_turn"]) for prompter in (one, three))
    at = short.image_start
    assert long.image_start == at + 1 > 1
    assert long.ids == [*short.ids[:at], 7, IMAGE, 8, *short.ids[at + 1 :]]
    assert long.text_tokens == short.text_tokens + 2 == len(short.ids) + 1


def test_marks_between_runs_of_visual_tokens_are_text(folder: Path) -> None:
    one = Prompter(spec_for(LLAVA_TEMPLATE), folder / "byte_level.json")
    runs = Prompter(spec_for(LLAVA_TEMPLATE, (7, IMAGE, 8, 9, IMAGE)), folder / "byte_level.json")
    short, long = (prompter.encode(CONVERSATIONS["one_turn"]) for prompter in (one, runs))
    assert long.image_start == short.image_start + 1
    assert long.text_tokens == short.text_tokens + 3


def test_bos_may_stand_behind_the_picture(folder: Path) -> None:
    """As PaliGemma's processor writes it: the tokenizer then adds no other."""
    template = "<image>{{ bos_token }}{{ messages[0]['content'][1]['text'] }}{{ '\\n' }}"
    prompter = Prompter(spec_for(template), folder / "byte_level.json")
    prompt = prompter.encode(prompter.messages_for("what is it ?"))
    assert prompt.text == "<image><s>what is it ?\n"
    assert prompt.ids[:2] == [IMAGE, 1] and prompt.ids.count(1) == 1


def test_what_a_template_writes_for_an_image_may_be_another_text(folder: Path) -> None:
    """It is replaced before the text is tokenized, and a user may not write it."""
    template = LLAVA_TEMPLATE.replace("<image>", "[PICTURE]")
    changes = {"image_mark": "[PICTURE]", "image_text": "\n[PICTURE]<image>!\n"}
    spec = dataclasses.replace(spec_for(template), **changes)
    assert TextSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    prompter = Prompter(spec, folder / "byte_level.json")
    prompt = prompter.encode(prompter.messages_for("what is it ?"))
    text = "USER: \n[PICTURE]<image>!\n\nwhat is it ? ASSISTANT:"
    assert prompt.text == text and prompt.ids == FAST["byte_level"](text)["input_ids"]
    with pytest.raises(UsageError, match=r"holds '\[PICTURE\]', a control token"):
        prompter.encode(prompter.messages_for("what is [PICTURE] ?"))


def test_without_a_template_a_single_question_takes_llavas_form(folder: Path) -> None:
    plain = Prompter(spec_for(None), folder / "llama.json")
    templated = Prompter(spec_for(LLAVA_TEMPLATE), folder / "llama.json")
    assert plain.encode(CONVERSATIONS["one_turn"]) == templated.encode(CONVERSATIONS["one_turn"])
    with pytest.raises(UsageError, match="no chat template"):
        plain.encode(CONVERSATIONS["image_first_turn"])


FEATURES = {
    "loop_controls": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
    "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "trim_and_lstrip": "{% if true %}\n    a\n    {% if true %}\nb\n    {% endif %}\n{% endif %}\nc",
    "tojson": "{{ {'b': '<é>', 'a': [1, none]} | tojson }}{{ [1] | tojson(indent=2) }}",
    "namespace": "{% set n = namespace(x=1) %}{% for i in [1, 2] %}{% set n.x = n.x + i %}{% endfor %}"
    "{{ n.x }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys(['b'], 2) }}",
    "generation": "{% generation %}\nsaid{% endgeneration %}!",
    "date": "{{ strftime_now('%Y') | length }}",
    "variables": "{{ bos_token }}|{{ tools }}|{{ documents }}|{{ add_generation_prompt }}|{{ nothing_such }}",
    "roles": "{{ messages[0]['role'] }}{{ messages[0].content[1].text }}",
}


@pytest.mark.parametrize("name", FEATURES)
def test_templates_render_as_in_transformers(name: str, folder: Path) -> None:
    source = FEATURES[name] + "<image>{{ messages[-1]['content'][-1]['text'] }}"
    prompter = Prompter(spec_for(source), folder / "byte_level.json")
    messages = CONVERSATIONS["one_turn"]
    special: dict[str, Any] = dict(prompter.spec.special_tokens)
    rendered: Any = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, **special
    )
    assert prompter.encode(messages).text == rendered[0][0]
    assert not rendered[0][0].startswith("<image>")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{% set n = namespace(_x=1) %}", "_x"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ 1 / 0 }}", "division"),
        ("<image>, but no question", "left out"),
    ],
)
def test_templates_that_raise_become_one_line(source: str, named: str, folder: Path) -> None:
    with pytest.raises(VtpError) as caught:
        Prompter(spec_for(source), folder / "byte_level.json").encode(CONVERSATIONS["one_turn"])
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_broken_parts_of_a_bundle_are_refused(folder: Path, tmp_path: Path) -> None:
    for template, count in (
        ("{{ messages[-1].content[-1].text }}", 0),
        ("<image><image>{{ messages[-1].content[-1].text }}", 2),
    ):
        with pytest.raises(VtpError, match=f"put {count} image tokens"):
            Prompter(spec_for(template), folder / "byte_level.json").encode(CONVERSATIONS["one_turn"])
    with pytest.raises(VtpError, match="does not compile"):
        Prompter(spec_for("{% if %}"), folder / "byte_level.json")
    with pytest.raises(VtpError, match="no tokenizer"):
        Prompter(spec_for(None), tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(VtpError, match=r"not a readable tokenizer\.json"):
        Prompter(spec_for(None), tmp_path / "tokenizer.json")
    with pytest.raises(VtpError, match="the id 3"):
        Prompter(TextSpec(None, "<image>", 4, (4,)), folder / "byte_level.json")
    with pytest.raises(VtpError, match="placeholder_ids"):
        TextSpec(None, "<image>", 4, ())
    with pytest.raises(VtpError, match="lacks image_token_id"):
        TextSpec(None, "<image>", 4, (7, 8))
    with pytest.raises(VtpError, match="image_token"):
        TextSpec(None, "", 4, (4,))


def test_a_text_spec_survives_json() -> None:
    spec = spec_for(LLAVA_TEMPLATE, (7, IMAGE, 8))
    data = json.loads(json.dumps(spec.to_json()))
    assert TextSpec.from_json(data) == spec
    with pytest.raises(VtpError, match="mood"):
        TextSpec.from_json({**data, "mood": 1})
    del data["image_token"]
    with pytest.raises(VtpError, match="image_token"):
        TextSpec.from_json(data)


IMAGE_PART = {"type": "image"}
BAD_MESSAGES: list[tuple[Any, str]] = [
    ("what is it ?", "list of turns"),
    ([], "empty"),
    (["what ?"], "message 0"),
    ([{"role": "user"}], "keys role and content"),
    ([{**user("IMAGE", "hi"), "name": "Bo"}], "name"),
    ([{"role": "tool", "content": "hi"}], "'tool'"),
    ([{"role": "user", "content": 3}], "content"),
    ([{"role": "user", "content": []}], "content"),
    ([{"role": "user", "content": [IMAGE_PART, {"type": "audio"}]}], "'audio'"),
    ([{"role": "user", "content": [IMAGE_PART, "hi"]}], "None"),
    ([{"role": "user", "content": [IMAGE_PART, {"type": "text"}]}], "text part"),
    ([{"role": "user", "content": [{"type": "image", "url": "x.png"}]}], "image="),
    ([user("hi")], "0 images"),
    ([user("IMAGE", "hi", "IMAGE")], "2 images"),
    ([{"role": "system", "content": [IMAGE_PART]}, user("hi")], "only user turns"),
    ([user("IMAGE", "hi"), said("assistant", "yes")], "last message"),
    ([user("IMAGE")], "empty"),
    ([user("IMAGE", " \n\t ")], "empty"),
    ([said("system", "be brief"), user("IMAGE")], "empty"),
    ([user("IMAGE", "what is <image> ?")], "'<image>'"),
    ([user("IMAGE", "stop</s>here")], "'</s>'"),
    ([user("IMAGE", "<im", "age> ?")], "'<image>'"),
    ([said("system", "<s>"), user("IMAGE", "hi")], "'<s>'"),
]


@pytest.mark.parametrize(("messages", "named"), BAD_MESSAGES)
def test_bad_messages_are_refused(messages: Any, named: str, folder: Path) -> None:
    prompter = Prompter(spec_for(LLAVA_TEMPLATE), folder / "llama.json")
    with pytest.raises(UsageError) as caught:
        prompter.encode(messages)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", ["", "  \n\t ", None, 7])
def test_bad_prompts_are_refused(prompt: Any, folder: Path) -> None:
    prompter = Prompter(spec_for(LLAVA_TEMPLATE), folder / "llama.json")
    with pytest.raises(UsageError, match="prompt"):
        prompter.messages_for(prompt)


def test_plain_text_content_works_where_the_template_takes_it(folder: Path) -> None:
    messages = [
        user("IMAGE", "what is it ?"),
        {"role": "assistant", "content": "a star"},
        {"role": "user", "content": "why ?"},
    ]
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %};"
        "{% endfor %}"
    )
    prompt = Prompter(spec_for(template), folder / "byte_level.json").encode(messages)
    assert prompt.text == "user:<image>what is it ?;assistant:a star;user:why ?;"
    with pytest.raises(UsageError, match="list of parts"):
        Prompter(spec_for(LLAVA_TEMPLATE), folder / "byte_level.json").encode(messages)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


def expected_text(name: str, ids: list[int]) -> str:
    return str(FAST[name].decode(ids, skip_special_tokens=True))


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), data=st.data())
def test_streamed_text_of_any_ids_equals_transformers(name: str, data: st.DataObject) -> None:
    size = TOKENIZERS[name].get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 1), max_size=60))
    assert "".join(streamed(TOKENIZERS[name], ids)) == expected_text(name, ids)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), text=st.text(max_size=60))
def test_streamed_text_of_any_words_equals_transformers(name: str, text: str) -> None:
    ids = TOKENIZERS[name].encode(text).ids
    assert "".join(streamed(TOKENIZERS[name], ids)) == expected_text(name, ids)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.sampled_from([0x20, 0x41, 0x80, 0xBF, 0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0xFF]))
)
def test_broken_bytes_stream_as_they_decode(values: list[int]) -> None:
    """Cut, stray and overlong bytes, one token each, in both ways that tokenizers spell bytes."""
    alphabet = byte_spelling()
    for name, tokens in (
        ("byte_level", [alphabet[v] for v in values]),
        ("llama", [f"<0x{v:02X}>" for v in values]),
    ):
        found = [TOKENIZERS[name].token_to_id(token) for token in tokens]
        ids = [token for token in found if token is not None]
        assert len(ids) == len(values)
        assert "".join(streamed(TOKENIZERS[name], ids)) == expected_text(name, ids)


def byte_spelling() -> dict[int, str]:
    """GPT-2's character for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in plain]
    return {value: chr(value) for value in plain} | {value: chr(256 + at) for at, value in enumerate(others)}


@pytest.mark.parametrize("name", GROWING)
def test_text_comes_piece_by_piece(name: str) -> None:
    ids = TOKENIZERS[name].encode("what color is the star ? the star is red").ids
    pieces = streamed(TOKENIZERS[name], ids)
    assert sum(bool(piece) for piece in pieces) >= 8
    assert pieces[-1] == ""


def test_a_split_character_waits_for_its_last_byte() -> None:
    for name, text in (("byte_level", "a🙂b"), ("llama", "a🙂b")):
        ids = TOKENIZERS[name].encode(text).ids
        pieces = streamed(TOKENIZERS[name], ids)
        assert len(ids) > len(text)
        assert "�" not in "".join(pieces) and any("🙂" in piece for piece in pieces)


def test_a_decoder_that_rewrites_gives_all_at_the_end() -> None:
    ids = TOKENIZERS["rewriting"].encode("it is this").ids
    pieces = streamed(TOKENIZERS["rewriting"], ids)
    assert pieces[-1] == "it IS thIS" and not any(pieces[:-1])


class CountingTokenizer:
    """Passes everything on, and counts the tokens that were decoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


@pytest.mark.parametrize("name", GROWING)
def test_long_answers_cost_no_more_per_token(name: str) -> None:
    size = TOKENIZERS[name].get_vocab_size()
    chance = np.random.default_rng(5)
    answers = [chance.integers(5, size, 3000).tolist(), [int(chance.integers(5, size))] * 3000]
    if name == "byte_level":
        answers.append([TOKENIZERS[name].token_to_id(byte_spelling()[0xFF])] * 3000)
    if name == "llama":
        answers.append([TOKENIZERS[name].token_to_id("<0xE2>")] * 3000)
    for ids in answers:
        counting = CountingTokenizer(TOKENIZERS[name])
        text = "".join(streamed(counting, ids))  # type: ignore[arg-type]
        assert text == expected_text(name, ids)
        assert len(ids) <= counting.decoded <= 20 * len(ids)


def test_a_detokenizer_starts_afresh_after_finish() -> None:
    detokenizer = Detokenizer(TOKENIZERS["llama"])
    ids = TOKENIZERS["llama"].encode("the star").ids
    for _ in range(2):
        assert "".join([*map(detokenizer.push, ids), detokenizer.finish()]) == "the star"


def cut_by_hand(text: str, stops: list[str]) -> str:
    """Read character by character; at the first that completes a stop string, cut where the longest began."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))]
    return text


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_wherever_tokens_split_them(pieces: list[str], stops: list[str]) -> None:
    holder, out = StopStrings(stops), ""
    full = "".join(pieces)
    expected = cut_by_hand(full, stops)
    for piece in pieces:
        out += holder.push(piece)
        assert expected.startswith(out)
    assert holder.hit == (expected != full or any(stop in full for stop in stops))
    assert out + holder.finish() == expected


def test_stop_strings_hold_back_no_more_than_they_must() -> None:
    holder = StopStrings(["\nUSER:"])
    assert [holder.push(piece) for piece in ("a star", "\nUS", "A\n", "\nUSER", ": more")] == [
        "a star",
        "",
        "\nUSA",
        "\n",
        "",
    ]
    assert holder.hit and holder.finish() == "" and holder.push("x") == ""
    assert StopStrings("b").push("abc") == "a"
    free = StopStrings()
    assert free.push("anything") == "anything" and not free.hit


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3], ""])
def test_bad_stop_strings_are_refused(stops: Any) -> None:
    with pytest.raises(UsageError, match="stop string"):
        StopStrings(stops)
