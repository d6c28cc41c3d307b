"""Answers held to a form, over real HTTP: as OpenAI's and Ollama's clients ask for it, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from vtp.runtime import Pipeline
from vtp.runtime.constrained.formats import Formats

from ..runtime.constrained.test_constrained_answers import JSON, SHORT
from ..runtime.constrained.writing import check
from .client import Answer, Site, data_url, shown, words


def ask(site: Site, picture: Image.Image, form: Any, **more: Any) -> Answer:
    content = [shown(picture), words("how many ?")]
    return site.chat(content, max_tokens=90, response_format=form, **more)


def test_openai(site: Site, alone: Pipeline, picture: Image.Image) -> None:
    wanted = alone.generate(picture, "how many ?", max_new_tokens=90, response_format=JSON)
    answer = ask(site, picture, JSON)
    assert answer.status == 200, answer.content
    assert answer.text == wanted.raw_text and check(answer.text, SHORT)
    assert answer.json["choices"][0]["finish_reason"] == "stop"
    *chunks, end = ask(site, picture, JSON, stream=True).events
    assert end is None
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == wanted.raw_text
    plain = alone.generate(picture, "how many ?", max_new_tokens=90)
    assert ask(site, picture, {"type": "text"}).text == plain.text != wanted.raw_text
    started = ask(site, picture, {"type": "json_object"}).text
    assert started.startswith("{")


def test_ollama(site: Site, alone: Pipeline, picture: Image.Image) -> None:
    wanted = alone.generate(picture, "how many ?", max_new_tokens=90, response_format=SHORT)
    body = {"prompt": "how many ?", "images": [data_url(picture).partition(",")[2]], "stream": False}
    answer = site.send("/api/generate", {**body, "format": SHORT, "options": {"num_predict": 90}})
    assert answer.status == 200, answer.content
    assert answer.json["response"] == wanted.raw_text and check(wanted.raw_text, SHORT)


def by_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def wide(which: int) -> dict[str, Any]:
    return {f"p{n}": {"type": "string", "pattern": f".*{which}.*{n}.*"} for n in range(10)}


BAD: list[tuple[Any, str, str]] = [
    ("json", "response_format", "response_format must be a JSON object, not text"),
    ({}, "response_format.type", "response_format.type is missing"),
    ({"type": "yaml"}, "response_format.type", "is not text or json_object or json_schema"),
    ({"type": "json_schema"}, "response_format", "type json_schema lacks"),
    (by_schema({"type": "strng"}), "response_format", "type 'strng' is not known; give one of"),
    (by_schema({"$ref": "#/none"}), "response_format", "$ref '#/none' leads nowhere"),
    (
        by_schema({"properties": {"a": {"const": "\0"}}}),
        "response_format",
        "properties.a.const: '\\x00' has a",
    ),
    (by_schema({"allOf": [{}] * 9}), "response_format", "allOf has 9"),
    (by_schema({"multipleOf": 999983}), "response_format", "multipleOf"),
]


@pytest.mark.parametrize(("form", "param", "message"), BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_forms(site: Site, picture: Image.Image, form: Any, param: str, message: str) -> None:
    answer = ask(site, picture, form)
    assert answer.status == 400, answer.content
    assert answer.error["param"] == param and message in answer.error["message"]
    assert "\n" not in answer.error["message"]


def test_a_schema_is_tried_once(site: Site, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates are tried with plainer turns; a bad schema is not."""
    compiled: list[str] = []
    real: Callable[..., Any] = Formats._compile

    def counted(self: Formats, schema: str) -> Any:
        compiled.append(schema)
        return real(self, schema)

    monkeypatch.setattr(Formats, "_compile", counted)
    assert ask(site, picture, by_schema({"type": "other"})).status == 400
    assert [json.loads(schema) for schema in compiled] == [{"type": "other"}]


LONG_NAMES = [f"{number}{'x' * 4000}" for number in range(7)]


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"type": "object", "properties": wide(which)} for which in range(100)]},
        {"type": "object", "properties": {name: {} for name in LONG_NAMES}, "required": LONG_NAMES},
        {"const": "<image></s>"},
    ],
)
def test_a_form_that_cannot_be_held_to_its_end_is_the_askers_fault(
    site: Site, picture: Image.Image, schema: Any
) -> None:
    answer = ask(site, picture, by_schema(schema))
    if answer.status != 200:  # where the answer ends before that shows
        assert answer.status == 400, answer.content
        assert answer.error["param"] == "response_format" and "cannot be held" in answer.error["message"]
