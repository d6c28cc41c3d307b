"""Conversations that a model's template does not take as they are, in a form that it takes."""

from __future__ import annotations

from typing import Any

import pytest

from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.prompt.forms import forms_of, one_video
from vtp.runtime.prompt.prompter import Prompter, TextSpec

# What the templates of real models do: Gemma's and Mistral's want turns to alternate and the first one to be
# the user's, llava-hf's drop text that is not in a list, vicuna's old one knows no system turn.
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
LISTS_ONLY = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content if p.type == 'image' %}<image>{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{% for p in m.content if p.type == 'image' %}"
    "<image>{% endfor %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
)


def user(text: str, images: int = 0) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


SYSTEM = {"role": "system", "content": "be short"}
ANSWER = {"role": "assistant", "content": "a star"}
TALKS: list[tuple[str | None, list[dict[str, Any]], str, str]] = [
    (ALTERNATING, [user("what ?", 1)], "[user]<image>what ?", ""),
    (ALTERNATING, [user("what", 1), user("now ?")], "[user]<image>what\nnow ?", "joined"),
    (
        ALTERNATING,
        [user("what ?", 1), ANSWER, user("and"), user("now", 1)],
        "[user]<image>what ?[assistant]a star[user]and\n<image>now",
        "joined",
    ),
    (ALTERNATING, [SYSTEM, user("what ?", 1)], "[user]<image>be short\nwhat ?", "system"),
    (ALTERNATING, [SYSTEM, user("what ?")], "[user]be short\nwhat ?", "system"),
    (LISTS_ONLY, [SYSTEM, user("what ?", 1)], "[system]be short[user]<image>what ?", ""),
    (LISTS_ONLY, [SYSTEM, {"role": "user", "content": "what ?"}], "[system]be short[user]what ?", ""),
    (NO_SYSTEM, [SYSTEM, user("what ?", 1)], "[user]<image>be short\nwhat ?", "system"),
    (None, [SYSTEM, user("what ?", 1)], "USER: <image>\nbe short\nwhat ? ASSISTANT:", "system"),
    (None, [user("what", 1), user("now ?")], "USER: <image>\nwhat\nnow ? ASSISTANT:", "joined"),
]


@pytest.fixture(scope="module")
def tokenizer(exported: Any) -> Any:
    """A tiny bundle's text section and tokenizer.json."""
    bundle = open_bundle(exported("vispruner").folder)
    return bundle.manifest.text, bundle.path("tokenizer.json")


@pytest.mark.parametrize(("template", "turns", "wanted", "note"), TALKS)
def test_the_first_form_that_the_template_takes(
    tokenizer: Any, template: str | None, turns: list[dict[str, Any]], wanted: str, note: str
) -> None:
    text, words = tokenizer
    prompter = Prompter(TextSpec(**{**vars(text), "chat_template": template}), words)
    images = sum(part == {"type": "image"} for turn in turns for part in turn["content"])
    found = []
    for form, notes in forms_of(turns):
        try:
            found.append((prompter.encode(form, images).text, notes))
        except Exception:
            continue
    rendered, notes = found[0]
    assert rendered == wanted
    assert bool(notes) == bool(note) and all(note in line for line in notes)


def test_forms_keep_every_word_and_picture() -> None:
    turns = [SYSTEM, user("one", 1), user("two", 2), ANSWER, ANSWER, SYSTEM, user("three")]
    for form, _ in forms_of(turns):
        parts = [part for turn in form for part in turn["content"] if not isinstance(part, str)]
        text = "".join(str(part.get("text", "")) for part in parts).replace("\n", "")
        if parts and not any(isinstance(turn["content"], str) for turn in form):
            assert sorted(text) == sorted("be shortonetwoa stara starbe shortthree")
            assert sum(part["type"] == "image" for part in parts) == 3


def test_a_system_turn_that_nothing_follows_stays() -> None:
    turns = [user("one"), SYSTEM]
    assert all(form[-1]["role"] == "system" for form, _ in forms_of(turns))


def test_pictures_are_the_frames_of_a_video() -> None:
    turns = [SYSTEM, user("one", 2), user("two", 1)]
    found = one_video(turns)
    parts = [part["type"] for turn in found for part in turn["content"] if not isinstance(part, str)]
    assert parts == ["video", "text", "text"] and found[0] == SYSTEM
