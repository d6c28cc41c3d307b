"""Prompts equal what transformers makes of the same words and templates; what is not one is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils.chat_template_utils import render_jinja_template

import vtp.scenes
from vtp.engines.errors import RequestError, UsageError, VtpError
from vtp.runtime.prompt.prompter import Prompter, TextSpec

from .tokenizer_kinds import FAST, IMAGE, LLAVA_TEMPLATE, TEMPLATES, TOKENIZERS, said, spec_for, user, wrapped


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
        ("{{ raise_exception('no ' + messages[0].content[1].text) }}", "no what color is the star ?"),
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
    own = "raise_exception" in source or named == "left out"  # what a server may pass on
    assert isinstance(caught.value, RequestError) == own


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
