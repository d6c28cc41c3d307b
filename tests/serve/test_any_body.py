"""Requests changed at random places: an answer or one clear line, never an error of the server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from .client import CHAT, Site, shown, words

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 30)
    | st.floats(allow_nan=True)
    | st.text(max_size=20)
    | st.sampled_from(["user", "system", "assistant", "auto", "low", "text", "image_url", "json_object", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = {
    "model": "tiny",
    "max_tokens": 2,
    "max_completion_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["zz"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "n": 1,
    "tools": [],
    "tool_choice": "auto",
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "text"},
    "repetition_penalty": 1.1,
    "vtp": {"keep_tokens": 3},
}


def whole() -> dict[str, Any]:
    dot = Image.new("RGB", (4, 4), "red")
    turns = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [shown(dot, detail="low"), words("what ?")]},
        {"role": "assistant", "content": "a dot"},
        {"role": "user", "content": "now ?"},
    ]
    return {**json.loads(json.dumps(FIELDS)), "messages": turns}


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be changed."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in inner for found in [(*at, key), *places(item, (*at, key))]]


def put(value: Any, at: tuple[Any, ...], new: Any) -> None:
    *way, last = at
    for key in way:
        value = value[key]
    value[last] = new


PLACES = places(whole())


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3), st.booleans())
def test_a_changed_request(site: Site, changes: list[tuple[tuple[Any, ...], Any]], drop: bool) -> None:
    body = whole()
    for at, new in changes:
        try:
            put(body, at, new)
        except (KeyError, IndexError, TypeError):  # an earlier change took the place away
            continue
    if drop:
        del body[changes[0][0][0]]
    answer = site.send(CHAT, json.dumps(body).encode())
    if answer.status != 200:
        assert answer.status in (400, 404), answer.content
        assert answer.error["message"].isprintable() and "log says why" not in answer.error["message"]


@pytest.mark.parametrize("path", [CHAT, "/api/chat", "/api/generate", "/v1/decisions"])
@settings(max_examples=40, deadline=None)
@given(body=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(site: Site, path: str, body: bytes) -> None:
    assert site.send(path, body).status in (200, 400, 404)


def test_the_server_goes_on(site: Site) -> None:
    assert site.chat("how many ?", max_tokens=2).status == 200
