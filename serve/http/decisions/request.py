"""A request for decisions, checked: its fields are those of SGLang's endpoint of the same name.

{"model", "input": text before every question, "images": [URL or {"url", "detail"}], "temperature",
 "questions": [{"id", "type": "yes_no" | "choice" | "score", "question", "options", "levels", "yes", "no"}]}

An option is a text, or {"name", "description"}. `labels` and `vtp` are this project's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vtp.engines.errors import quoted_argument
from vtp.runtime.decisions.question import CHOICE, KINDS, LABELS, LETTERS, SCORE
from vtp.serve.http.asking import PictureSource
from vtp.serve.http.errors import ApiError
from vtp.serve.http.fields import Fields, kind_of
from vtp.serve.http.openai.messages import DETAILS, highest
from vtp.serve.http.openai.request import read_own

MOST_QUESTIONS = 64
_HOTTEST = 100
_LONGEST_ID = 1024  # characters: the answer says each again
# Fields of SGLang's that change nothing here, or that no answer may depend on.
_IGNORED = ("chat_template_kwargs", "prompt_format_version", "return_prompt_token_ids", "user")


@dataclass(frozen=True)
class Asking:
    """One question: `at` is its place in the body, `arguments` are those of `Scheduler.decide`."""

    name: str
    at: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class DecisionsRequest:
    """What a client asks about some pictures.

    model    as it was given, checked when it is looked up
    before   text before every question: joined with one when that is asked, for it may be long
    options  arguments of `Scheduler.decide` that hold for all questions
    detail   see `asking.keep_of`
    unread   names of fields that nothing here knows
    """

    model: Any
    before: str
    pictures: tuple[PictureSource, ...]
    questions: tuple[Asking, ...]
    options: dict[str, Any]
    detail: str
    unread: tuple[str, ...]

    def arguments_of(self, question: Asking) -> dict[str, Any]:
        """All arguments of `Scheduler.decide` but the pictures and what the model decides."""
        parts = (self.before, question.arguments["question"])
        return {**question.arguments, "question": "\n\n".join(part for part in parts if part.strip())}


def read_decisions(body: Fields) -> DecisionsRequest:
    """Check a request's body. Raises ApiError 400, with `param`, for the first thing that is wrong."""
    model = body.raw("model")
    options = {"labels": body.choice("labels", LABELS) or LETTERS, **read_own(body)}
    if (temperature := body.number("temperature", 0, _HOTTEST)) is not None:
        if temperature == 0:
            raise ApiError(
                "temperature 0 leaves no probabilities; give more (1: the model's own)", param="temperature"
            )
        options["temperature"] = temperature
    before = _rendered(body.raw("input"), "input")
    pictures, details, unread = _pictures(body)
    questions, more = _questions(body, bool(before.strip()))
    for name in _IGNORED:
        body.raw(name)
    return DecisionsRequest(
        model, before, pictures, questions, options, highest(details), (*body.unread(), *unread, *more)
    )


def _pictures(body: Fields) -> tuple[tuple[PictureSource, ...], list[str], list[str]]:
    """The pictures, what detail each asks for, and unknown fields."""
    sources: list[PictureSource] = []
    details: list[str] = []
    unread: list[str] = []
    for place, one in enumerate(body.items("images") or ()):
        at = f"images.{place}"
        if isinstance(one, str):
            sources.append(PictureSource(one, at))
            continue
        image = Fields(one, at)
        image.raw("type")
        nested = image.raw("image_url")
        if isinstance(nested, str):
            sources.append(PictureSource(nested, image.param("image_url")))
            continue
        inner = image if nested is None else Fields(nested, image.param("image_url"))
        url, param = inner.text("url"), inner.param("url")
        if not url:
            raise ApiError(f"{param} is missing; give a data: URL", param=param)
        sources.append(PictureSource(url, param))
        details.append(inner.choice("detail", DETAILS) or "auto")
        unread += inner.unread()
    return tuple(sources), details, unread


def _questions(body: Fields, begun: bool) -> tuple[tuple[Asking, ...], list[str]]:
    given = body.items("questions")
    if not given:
        raise ApiError(
            'questions is missing or empty; give a list of {"type": "yes_no", "question": …}',
            param="questions",
        )
    if len(given) > MOST_QUESTIONS:
        raise ApiError(
            f"questions has {len(given)} entries; give at most {MOST_QUESTIONS}", param="questions"
        )
    found: dict[str, Asking] = {}
    unread: list[str] = []
    for place, one in enumerate(given):
        fields = Fields(one, f"questions.{place}")
        name = _name(fields, place)
        if name in found:
            at = fields.param("id")
            raise ApiError(f"{at} {quoted_argument(name)} is given twice; ids must differ", param=at)
        found[name] = Asking(name, f"questions.{place}", _arguments(fields, begun))
        unread += fields.unread()
    return tuple(found.values()), unread


def _name(fields: Fields, place: int) -> str:
    """The key of its answer; questions without an id are counted from 0."""
    name = fields.text("id")
    if name is None:
        return str(place)
    if not name.strip():
        raise ApiError(
            f"{fields.param('id')} is blank; leave it out, or give it text", param=fields.param("id")
        )
    if len(name) > _LONGEST_ID:
        at = fields.param("id")
        raise ApiError(f"{at} has {len(name)} characters; give at most {_LONGEST_ID}", param=at)
    return name


def _arguments(fields: Fields, begun: bool) -> dict[str, Any]:
    kind = fields.choice("type", KINDS)
    if kind is None:
        raise ApiError(
            f"{fields.param('type')} is missing; give {', '.join(KINDS)}", param=fields.param("type")
        )
    text = _rendered(fields.raw("question"), fields.param("question"))
    options = _options(fields, kind)
    if not (begun or text.strip()):
        raise ApiError(f"{fields.param('question')} is missing", param=fields.param("question"))
    return {"question": text, "kind": kind, "options": options}


def _options(fields: Fields, kind: str) -> Any:
    """The answers, as `Pipeline.decide` takes them; their number and texts are checked there."""
    if kind == CHOICE:
        return _named(fields, fields.items("options"))
    if kind == SCORE:
        levels = fields.items("levels")
        if levels is None:
            raise ApiError(
                f"{fields.param('levels')} is missing; give 2 to 10 texts", param=fields.param("levels")
            )
        return [_rendered(one, f"{fields.param('levels')}.{place}") for place, one in enumerate(levels)]
    meanings = {name: _rendered(fields.raw(name), fields.param(name)) for name in ("yes", "no")}
    return {name: meaning for name, meaning in meanings.items() if meaning} or None


def _named(fields: Fields, options: list[Any] | None) -> dict[str, str]:
    """Option -> what it means, or ""."""
    at = fields.param("options")
    if options is None:
        raise ApiError(f"{at} is missing; give 2 to 26 texts", param=at)
    named: dict[str, str] = {}
    for place, one in enumerate(options):
        where = f"{at}.{place}"
        entry = Fields({"name": one} if isinstance(one, str) else one, where)
        name = entry.text("name")
        if name is None:
            raise ApiError(f"{entry.param('name')} is missing; give the option's text", param=where)
        if name in named:
            raise ApiError(
                f"{where} {quoted_argument(name)} is given twice; options must differ", param=where
            )
        named[name] = _rendered(entry.raw("description"), entry.param("description"))
    return named


def _rendered(value: object, at: str) -> str:
    """Text as it is; an object or a list as JSON; "" for null."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping | list):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    raise ApiError(f"{at} must be text, not {kind_of(value)}", param=at)
