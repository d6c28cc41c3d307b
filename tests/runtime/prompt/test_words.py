"""No word of a prompt is lost or misread: broken text, special tokens, tuples, turns left out, lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from vtp.engines.errors import UsageError, VtpError
from vtp.runtime import Pipeline
from vtp.runtime.commands.run import _options, build_parser
from vtp.runtime.prompt.prompter import Detokenizer, Prompter, PromptTooLong, StopStrings, TextSpec

from .tokenizer_kinds import FAST, IMAGE, LLAVA_TEMPLATE, TOKENIZERS, said, spec_for, user, wrapped

PARTS = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %};"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    TOKENIZERS["byte_level"].save(str(path))
    return path


def refused(act: Callable[[], object], match: str | None, kind: type[VtpError] = UsageError) -> None:
    with pytest.raises(kind, match=match) as caught:
        act()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# -- text that is none, and conversations of other forms -----------------------------------------------------


def test_a_lone_surrogate_is_one_line(tokenizer_file: Path) -> None:
    """transformers raises as well: there is no such character."""
    prompter = Prompter(spec_for(LLAVA_TEMPLATE), tokenizer_file)
    with pytest.raises(TypeError):
        FAST["byte_level"]("what \ud83d ?")
    refused(lambda: prompter.messages_for("what \ud83d ?"), r"lone surrogate U\+D83D\) at place 5")
    for turns in ([user("IMAGE", "a\udc80")], [said("system", "\udfff"), user("IMAGE", "hi")]):
        refused(lambda turns=turns: prompter.encode(turns), "lone surrogate")  # type: ignore[misc]
    refused(lambda: StopStrings(["\ud800"]), "lone surrogate")
    assert prompter.encode(prompter.messages_for("a \N{SLIGHTLY SMILING FACE} \0 b")).text_tokens > 5


def test_a_tuple_of_parts_is_a_list_of_parts(tokenizer_file: Path) -> None:
    prompter = Prompter(spec_for(LLAVA_TEMPLATE), tokenizer_file)
    listed = [user("IMAGE", "what ?"), said("assistant", "a star"), user("why", "is it ?")]
    tupled = tuple({**turn, "content": tuple(turn["content"])} for turn in listed)
    assert prompter.encode(tupled) == prompter.encode(listed)


def test_a_tuple_without_a_picture_gets_it_as_a_list_does(
    exported: Callable[[str], Any], picture: Image.Image
) -> None:
    words = {"type": "text", "text": "what shape is the red ?"}
    with Pipeline.load(exported("vispruner").folder, threads=1) as pipe:
        listed = pipe.generate(picture, messages=[{"role": "user", "content": [words]}], max_new_tokens=4)
        tupled = pipe.generate(picture, messages=[{"role": "user", "content": (words,)}], max_new_tokens=4)
        marked = pipe.generate(
            picture, messages=[{"role": "user", "content": ({"type": "image"}, words)}], max_new_tokens=4
        )
    assert tupled.token_ids == listed.token_ids == marked.token_ids
    assert tupled.prompt_tokens == listed.prompt_tokens == marked.prompt_tokens


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


STRANGE: list[Any] = [
    b"what ?",
    7,
    [b"what ?"],
    [{"role": "user", "content": b"hi"}],
    [{"role": "user", "content": nested(50_000)}],
    [{"role": nested(50_000), "content": "hi"}],
    [{"role": "x" * 10**7, "content": "hi"}],
    [{"role": "user", "content": [{"type": "x" * 10**7}]}],
    [{"role": "user", "content": [{"type": nested(50_000)}]}],
    [{"role": "user", "content": "hi", **{f"key{number}": 1 for number in range(50_000)}}],
    [{"role": "user", "content": {"type": "text"}}],
    [{"role": "user", "content": [["text", "hi"]]}],
    [user("IMAGE", "hi")] * 50_000,
    [{"role": "user", "content": [{"type": "text", "text": "a"}] * 50_000}],
    [{1: "user", "content": "hi"}],
    [{"role": "us\ner", "content": "hi"}],
]


@pytest.mark.parametrize("number", range(len(STRANGE)))
def test_conversations_of_other_forms_are_one_line(number: int, tokenizer_file: Path) -> None:
    prompter = Prompter(spec_for(PARTS), tokenizer_file, most_tokens=4096)
    refused(lambda: prompter.encode(STRANGE[number]), None)


@pytest.mark.parametrize(
    "stops", [b"abc", {"a"}, [b"a"], ["a"] * 100_000, ["x" * 10**7], [nested(50_000)], 3, {"a": 1}]
)
def test_strange_stop_strings_are_one_line(stops: Any) -> None:
    refused(lambda: StopStrings(stops), "stop string")


# -- words that a template leaves out ------------------------------------------------------------------------

NO_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}{% for p in m.content %}{{ '<image>' if p.type == 'image' "
)
NO_SYSTEM += "else p.text }}{% endfor %};{% endfor %}"
FIRST_TEXT = "{% for m in messages %}{% if m.content[0].type == 'image' %}<image>{% endif %}{{ (m.content | "
FIRST_TEXT += "selectattr('type', 'equalto', 'text') | first).text }};{% endfor %}"
LAST_TURN = "<image>{{ messages[-1].content[-1].text }}"
LOSING: list[tuple[str, list[dict[str, Any]], str]] = [
    (NO_SYSTEM, [said("system", "be brief"), user("IMAGE", "what ?")], "system"),
    (
        NO_SYSTEM,
        [said("system", "a"), user("IMAGE", "what is that ?")],
        "system",
    ),  # 'a' is there all the same
    (FIRST_TEXT, [user("IMAGE", "what is it", "and why ?")], "user"),
    (FIRST_TEXT, [user("IMAGE", "what is it ?", "it")], "user"),
    (LAST_TURN, [user("IMAGE", "what ?"), said("assistant", "a star"), user("why ?")], "user"),
    (LAST_TURN, [user("IMAGE", "why ?"), said("assistant", "why ?"), user("why ?")], "user"),
    (
        PARTS.replace("m.content is string", "m.role == 'nobody'"),
        [{"role": "user", "content": "what ?"}],
        "user",
    ),
]


@pytest.mark.parametrize("number", range(len(LOSING)))
def test_a_template_that_leaves_out_words_is_refused(number: int, tokenizer_file: Path) -> None:
    template, turns, whose = LOSING[number]
    prompter = Prompter(spec_for(template), tokenizer_file)
    pictures = str(turns).count("'image'")
    refused(lambda: prompter.encode(turns, pictures), f"(left out the {whose}'s text|refuses these messages)")


def test_a_conversation_of_the_same_form_is_known(tokenizer_file: Path) -> None:
    """What is remembered is that nothing was left out: another form is tried again."""
    prompter = Prompter(spec_for(NO_SYSTEM), tokenizer_file)
    for words in ("what is it ?", "why ?"):
        assert prompter.encode([user("IMAGE", words)]).text == f"<image>{words};"
    refused(lambda: prompter.encode([said("system", "w"), user("IMAGE", "why ?")]), "left out the system's")
    refused(lambda: prompter.encode([said("system", "w"), user("IMAGE", "why ?")]), "left out the system's")


def test_thoughts_of_earlier_answers_may_go(tokenizer_file: Path) -> None:
    """Templates of reasoning models cut them; the answer itself stays."""
    template = PARTS.replace("else p.text", "else p.text.split('</think>')[-1]")
    turns = [user("IMAGE", "what ?"), said("assistant", "<think>hm</think>a star"), user("why ?")]
    text = Prompter(spec_for(template), tokenizer_file).encode(turns).text
    assert text == "user:<image>what ?;assistant:a star;user:why ?;"


# -- special tokens that are content -------------------------------------------------------------------------

BOXES = [
    AddedToken(text, special=True, normalized=False) for text in ("<|box_start|>", "<|box_end|>", "<loc_7>")
]


def boxed(name: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(TOKENIZERS[name].to_str())
    tokenizer.add_special_tokens(BOXES)
    return tokenizer


BOXED = {name: boxed(name) for name in ("byte_level", "llama", "metaspace_first", "wordpiece")}


@pytest.mark.parametrize("name", BOXED)
def test_allowed_special_tokens_mean_what_they_mean_in_transformers(name: str, tmp_path: Path) -> None:
    BOXED[name].save(str(tmp_path / "tokenizer.json"))
    prompter = Prompter(spec_for(LLAVA_TEMPLATE), tmp_path / "tokenizer.json")
    words = "what is in <|box_start|>(1,2)<|box_end|><loc_7> ?"
    refused(lambda: prompter.encode(prompter.messages_for(words)), r"'<\|box_start\|>'.*allow_special_tokens")
    prompt = prompter.encode(prompter.messages_for(words), allow_special_tokens=True)
    assert prompt.ids == wrapped(BOXED[name])(prompt.text)["input_ids"]
    assert {prompter.tokenizer.token_to_id(token.content) for token in BOXES} <= set(prompt.ids)
    for place in ("a <image> b", "<im", "<image>"):
        turns = [user("IMAGE", place, "age> ?")]
        refused(lambda turns=turns: prompter.encode(turns, 1, True), "'<image>'")  # type: ignore[misc]


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(BOXED)), data=st.data())
def test_kept_special_tokens_stream_as_transformers_decodes_them(name: str, data: st.DataObject) -> None:
    size = BOXED[name].get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1) | st.integers(size - 3, size - 1), max_size=50))
    for skip in (False, True):
        stream = Detokenizer(BOXED[name], skip_special_tokens=skip)
        text = "".join([*map(stream.push, ids), stream.finish()])
        assert text == wrapped_boxes(name).decode(ids, skip_special_tokens=skip)


_WRAPPED: dict[str, Any] = {}


def wrapped_boxes(name: str) -> Any:
    if name not in _WRAPPED:
        _WRAPPED[name] = wrapped(BOXED[name])
    return _WRAPPED[name]


def test_an_answer_keeps_its_special_tokens_where_asked(
    exported: Callable[[str], Any], picture: Image.Image
) -> None:
    made = exported("vispruner")
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    kept = 0
    with Pipeline.load(made.folder, threads=1) as pipe:
        ends = pipe.manifest.text.eos_token_ids
        for seed in range(12):
            options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 9.0, "seed": seed}
            whole = pipe.generate(picture, "what shape is the red ?", skip_special_tokens=False, **options)
            plain = pipe.generate(picture, "what shape is the red ?", **options)
            ids = [token for token in whole.token_ids if token not in ends]
            assert whole.token_ids == plain.token_ids
            assert whole.text == tokenizer.decode(ids, skip_special_tokens=False)
            assert plain.text == tokenizer.decode(ids, skip_special_tokens=True)
            kept += whole.text != plain.text
        batch = pipe.generate_batch(
            [picture], ["what shape is the red ?"], skip_special_tokens=False, max_new_tokens=4
        )
        assert batch[0].text == tokenizer.decode(batch[0].token_ids, skip_special_tokens=False)
        refused(lambda: pipe.generate(picture, "a <s> b"), "control token")
        allowed = pipe.generate(picture, "a <s> b", allow_special_tokens=True, max_new_tokens=1)
        assert allowed.prompt_tokens > 3
    assert kept >= 1


def test_the_command_line_has_both_options() -> None:
    for flags, skip, allow in (
        ([], True, False),
        (["--special-tokens", "--allow-special-tokens"], False, True),
    ):
        options = _options(build_parser().parse_args(["bundle", *flags]))
        assert options["skip_special_tokens"] is skip and options["allow_special_tokens"] is allow


# -- length --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_text_that_fits_is_never_too_long(name: str, tmp_path: Path) -> None:
    """As many of the longest token as there is room for."""
    TOKENIZERS[name].save(str(tmp_path / "tokenizer.json"))
    prompter = Prompter(spec_for(PARTS), tmp_path / "tokenizer.json", most_tokens=4000)
    words = "what color is the star ? " * 1200
    turns = [user("IMAGE", words)]
    assert len(prompter.encode(turns).ids) > 1000


def test_text_that_cannot_fit_is_refused_before_it_is_encoded(tokenizer_file: Path) -> None:
    prompter = Prompter(spec_for(PARTS), tokenizer_file, most_tokens=4000)
    longest = max(map(len, prompter.tokenizer.get_vocab()))
    encoded: list[str] = []
    encode = prompter._words.encode
    prompter._words.encode = lambda text, add_special_tokens: (  # type: ignore[method-assign]
        encoded.append(text) or encode(text, add_special_tokens)
    )
    refused(
        lambda: prompter.encode([user("IMAGE", "a " * 10_000_000)]),
        "20000000 characters.*--max-length",
        PromptTooLong,
    )
    many = [user("IMAGE", "x"), *[said("assistant", "x" * 400_000), user("y" * 400_000)] * 10]
    refused(lambda: prompter.encode(many), "characters", PromptTooLong)
    assert not encoded
    fits = "a" * (4000 * longest)  # whatever they are, this many characters may be 4,000 tokens
    prompter.encode([user("IMAGE", fits)])
    assert len(encoded) == 1


def test_a_pipeline_knows_what_fits(exported: Callable[[str], Any], picture: Image.Image) -> None:
    with Pipeline.load(exported("vispruner").folder, threads=1) as pipe:
        refused(lambda: pipe.generate(picture, "a " * 5_000_000), "characters", PromptTooLong)
        for prompt in (b"what ?", 7, ["what ?"]):
            refused(lambda prompt=prompt: pipe.generate(picture, prompt), "must be text")  # type: ignore[misc]


def test_a_spec_that_marks_images_otherwise_keeps_its_mark_for_itself(tokenizer_file: Path) -> None:
    spec: TextSpec = dataclasses.replace(
        spec_for(LLAVA_TEMPLATE.replace("<image>", "[P]")), image_mark="[P]", image_text="<image>"
    )
    prompter = Prompter(spec, tokenizer_file)
    refused(lambda: prompter.encode([user("IMAGE", "a [P] b")], 1, True), r"'\[P\]'")
    assert np.count_nonzero(np.array(prompter.encode([user("IMAGE", "a")]).ids) == IMAGE) == 1
