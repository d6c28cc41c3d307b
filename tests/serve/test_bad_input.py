"""Whatever is sent: the right status, OpenAI's error body, one clear line, and a server that goes on."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import RequestError
from vtp.serve.http.errors import FAILED, ApiError, holds_no_secret
from vtp.serve.http.refusals import told
from vtp.serve.logs import Sparing

from .client import CHAT, Answer, Site, shown, words

USER = {"role": "user", "content": "how many ?"}


def refused(answer: Answer, status: int, param: str | None, line: str) -> None:
    """Hold an answer against what it must be."""
    assert answer.status == status, answer.content
    assert answer.json.keys() == {"error"} and answer.error.keys() == {"message", "type", "param", "code"}
    message = answer.error["message"]
    assert re.search(line, message), message
    assert answer.error["param"] == param
    assert message.isprintable() and len(message) < 500 and holds_no_secret(message)


# -- bodies that are no requests -----------------------------------------------------------------------------

BODIES: list[tuple[bytes, str]] = [
    (b"", "the body is empty; send a JSON object"),
    (b"{", "the body is not valid JSON"),
    (b"hello", "the body is not valid JSON"),
    (b"[]", "the body must be a JSON object, not a list"),
    (b"null", "the body must be a JSON object, not null"),
    (b"3", "the body must be a JSON object, not a number"),
    (b'"text"', "the body must be a JSON object, not text"),
    (b"\xff\xfe", "is not UTF-8"),
    (b"\x1f\x8b\x08\x00", "is not UTF-8"),
    (b'{"a": 1, "a": 2}', "the key 'a' is given twice"),
    (b'{"temperature": NaN}', "NaN is not a JSON number"),
    (b'{"temperature": Infinity}', "Infinity is not a JSON number"),
    (b'{"seed": 1' + b"0" * 5000 + b"}", "is too large"),
    (b'{"a":' * 9000 + b"1" + b"}" * 9000, "more than 64 deep"),
    (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half of a surrogate pair"),
    (b'{"\\udc00": 1}', "half of a surrogate pair"),
    (b'{"model": "\\ud800"}', "half of a surrogate pair"),
    (b'{"messages": []}' + b"x", "the body is not valid JSON"),
    (b'{"a": [' + b"[]," * 70000 + b"1]}", "the body has more than 65,536 values"),
    (b'{"a": ' + b"[" * 70000, "the body has more than 65,536 values"),
]


@pytest.mark.parametrize(("body", "line"), BODIES)
def test_bodies_that_are_not_json(site: Site, body: bytes, line: str) -> None:
    refused(site.send(CHAT, body), 400, None, line)


# -- fields of the wrong kind --------------------------------------------------------------------------------

WHOLE = ["max_tokens", "max_completion_tokens", "seed", "n", "top_logprobs"]
NUMBERS = ["temperature", "top_p", "repetition_penalty"]
FLAGS = ["stream", "logprobs"]
LISTS = ["tools", "functions", "modalities"]
OBJECTS = ["stream_options", "response_format", "vtp"]
WRONG: list[tuple[str, Any, str]] = [
    *[
        (name, value, "is not a whole number")
        for name in WHOLE
        for value in ("5", 1.5, True, [], {}, 2**62 * 2.0)
    ],
    *[(name, value, "is not a number from") for name in NUMBERS for value in ("1", True, [1], {}, -1, 1e300)],
    *[(name, value, "is not true or false") for name in FLAGS for value in ("true", 1, 0, [], {})],
    *[(name, value, "is not a list") for name in LISTS for value in ("x", 1, True, {"a": 1})],
    *[(name, value, "must be a JSON object") for name in OBJECTS for value in ("x", 1, True, [])],
]


@pytest.mark.parametrize(("name", "value", "line"), WRONG)
def test_fields_of_the_wrong_kind(site: Site, name: str, value: Any, line: str) -> None:
    refused(site.chat(**{name: value}), 400, name, line)


OUT_OF_RANGE: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": 0}, "max_tokens", "max_tokens 0 is not a whole number from 1"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens -1 is not a whole number from 1"),
    ({"max_completion_tokens": -5}, "max_completion_tokens", "is not a whole number from 1"),
    ({"n": 2}, "n", "n must be 1"),
    ({"n": 0}, "n", "n 0 is not a whole number from 1"),
    ({"seed": -2}, "seed", "seed -2 is not a whole number from -1"),
    ({"temperature": 2.01}, "temperature", "is not a number from 0 to 2"),
    ({"top_p": 0}, "top_p", "top_p 0 leaves no token"),
    ({"top_p": 1.01}, "top_p", "is not a number from 0 to 1"),
    ({"stop": 3}, "stop", "stop 3 is not text, or a list of texts"),
    ({"stop": ["a", 3]}, "stop", "is not text, or a list of texts"),
    ({"stop": ""}, "stop", "of at least one character"),
    ({"stop": ["x"] * 17}, "stop", "stop has 17 texts; give at most 16"),
    ({"stop": ["x" * 2000] * 3}, "stop", "stop has 6000 characters together; give at most 4096"),
    ({"stop": {"a": 1}}, "stop", "is not text, or a list of texts"),
    ({"tools": [{"type": "function"}]}, "tools", "tools are not served"),
    ({"functions": [{}]}, "functions", "functions are not served"),
    ({"tool_choice": "required"}, "tool_choice", "tool_choice is not served"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "tool_choice is not served"),
    ({"modalities": ["text", "audio"]}, "modalities", "modalities 'audio' is not served"),
    ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", "is not true or false"),
    ({"response_format": {}}, "response_format.type", "response_format.type is missing"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'xml' is not text or json_object"),
    ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "is not a whole number from 0 to 20"),
    ({"vtp": {"keep_tokens": 0}}, "vtp.keep_tokens", "is not a whole number from 1"),
    ({"vtp": {"keep_tokens": 4}}, "vtp.keep_tokens", "keep_tokens 4 is not in this bundle, which holds 3, 6"),
    ({"vtp": {"budget_ms": 50}}, "vtp.budget_ms", "this bundle is not calibrated"),
    ({"vtp": {"budget_ms": 50, "keep_tokens": 3}}, "vtp", "either vtp.keep_tokens or vtp.budget_ms"),
    ({"vtp": {"keep_token": 3}}, "vtp", "unknown field 'keep_token'.* did you mean 'keep_tokens'"),
]


@pytest.mark.parametrize(("fields", "param", "line"), OUT_OF_RANGE)
def test_values_out_of_range(
    site: Site, picture: Image.Image, fields: dict[str, Any], param: str, line: str
) -> None:
    refused(site.chat([shown(picture), words("how many ?")], **fields), 400, param, line)


# -- messages ------------------------------------------------------------------------------------------------

IMAGE_URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
MESSAGES: list[tuple[Any, str, str]] = [
    (None, "messages", "messages must be a list of turns, not null"),
    ("hi", "messages", "messages must be a list of turns, not text"),
    ({}, "messages", "messages must be a list of turns, not an object"),
    ([], "messages", "messages is empty; give at least one user turn"),
    (["hi"], "messages.0", "messages.0 must be a JSON object, not text"),
    ([None], "messages.0", "messages.0 must be a JSON object, not null"),
    ([USER] * 5000, "messages", "messages has 5000 turns; at most 4096"),
    ([{}], "messages.0.role", "messages.0.role None is not served"),
    ([{"role": 1}], "messages.0.role", "messages.0.role 1 is not text"),
    ([{"role": "tool", "content": "x"}], "messages.0.role", "'tool' is not served; give system, developer, "),
    (
        [{"role": "user"}],
        "messages.0.content",
        "messages.0.content must be text or a list of parts, not null",
    ),
    ([{"role": "user", "content": 3}], "messages.0.content", "must be text or a list of parts, not a number"),
    ([{"role": "user", "content": []}], "messages.0.content", "messages.0.content is an empty list"),
    ([{"role": "user", "content": ["x"]}], "messages.0.content.0", "must be a JSON object, not text"),
    ([{"role": "user", "content": [{}]}], "messages.0.content.0.type", "None is not served; give text or"),
    (
        [{"role": "user", "content": [{"type": "input_audio"}]}],
        "messages.0.content.0.type",
        "'input_audio' is not served; give text or image_url",
    ),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text", "is missing"),
    (
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        "messages.0.content.0.text",
        "1 is not text",
    ),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0.image_url", "not null"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        "messages.0.content.0.image_url.url",
        "is missing; give a data: URL",
    ),
    (
        [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:,", "detail": "max"}}],
            }
        ],
        "messages.0.content.0.image_url.detail",
        "'max' is not low or auto or high",
    ),
    ([{"role": "system", "content": [IMAGE_URL]}, USER], "messages.0.content.0.type", "only user turns"),
    ([USER, {"role": "assistant", "content": "a star"}], "messages", "the last message is the assistant's"),
    ([{"role": "system", "content": "be short"}], "messages", "the last message is the system's"),
    ([{"role": "user", "content": " "}], "messages", "the prompt is empty"),
    ([{"role": "user", "content": "what <image> ?"}], "messages", "holds '<image>', a control token"),
    ([{"role": "user", "content": "</s> now ?"}], "messages", "holds '</s>', a control token"),
    ([{**USER, "tool_calls": [{"id": "1"}]}], "messages.0.tool_calls", "this server calls no tools"),
]


@pytest.mark.parametrize(("messages", "param", "line"), MESSAGES)
def test_messages_that_cannot_be_asked(site: Site, messages: Any, param: str, line: str) -> None:
    refused(site.send(CHAT, {"messages": messages}), 400, param, line)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_past_the_cache_is_told_with_both_numbers(
    site: Site, picture: Image.Image, stream: bool
) -> None:
    answer = site.chat([shown(picture), words("how many ? " * 60)], stream=stream)
    refused(answer, 400, "messages", r"the prompt has \d{3} tokens; beside 16 visual tokens .* room for 111")
    assert answer.error["code"] == "context_length_exceeded"
    twice = site.chat([shown(picture)] * 8)
    refused(twice, 400, "messages", r"the prompt")


def test_a_prompt_of_megabytes_is_refused_at_once(site: Site) -> None:
    answer = site.chat("how many ? " * 300_000)
    refused(answer, 400, "messages", r"the prompt has 3300000 characters, more than the 65536")
    assert answer.error["code"] == "context_length_exceeded"


# -- pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_pictures_of_any_shape_are_answered(site: Site, size: tuple[int, int]) -> None:
    answer = site.chat([shown(Image.new("RGB", size, "red")), words("how many ?")], max_tokens=2)
    assert answer.status == 200 and answer.json["vtp"]["visual_tokens"]["after"] == 6


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("data:image/png;base64,AAAA", "picture"),
        ("data:image/png;base64,%%%", "base64"),
        ("scene.png", "data: URL"),
        ("file:///etc/passwd", "data: URL"),
        ("http://127.0.0.1:9/a.png", "domain|fetch"),
    ],
)
def test_pictures_that_are_none(site: Site, url: str, line: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    answer = site.chat([part, words("how many ?")])
    assert answer.status == 400 and re.search(line, answer.error["message"]), answer.content
    assert answer.error["param"] == "messages.0.content.0.image_url.url"
    assert "/etc" not in answer.error["message"] and "127.0.0.1" not in answer.error["message"]


def test_too_many_pictures(site: Site) -> None:
    dot = shown(Image.new("RGB", (4, 4)))
    answer = site.chat([*[dot] * 17, words("how many ?")])
    refused(answer, 400, "messages.0.content.16.image_url.url", "holds 17 pictures; at most 16 are taken")


def test_transparency_is_flattened_and_said(site: Site) -> None:
    clear = Image.fromarray(np.zeros((8, 8, 4), np.uint8))
    answer = site.chat([shown(clear), words("how many ?")], max_tokens=2)
    white = site.chat([shown(Image.new("RGB", (8, 8), "white")), words("how many ?")], max_tokens=2)
    assert answer.text == white.text and answer.json["vtp"]["notes"] == [
        "transparent parts were laid on white"
    ]


def test_sides_that_are_cut_off_are_said(site: Site) -> None:
    answer = site.chat([*[shown(Image.new("RGB", (64, 48)))] * 2, words("how many ?")], max_tokens=1)
    (line,) = answer.json["vtp"]["notes"]
    assert line.startswith("24% of a picture of 64x48 is cut off at its sides")


# -- addresses and methods -----------------------------------------------------------------------------------


def test_what_is_not_there(site: Site) -> None:
    refused(site.send("/v1/nothing"), 404, None, "nothing at this address")
    refused(site.send("/v1/models/other"), 404, "model", "there is no model 'other'; this server has 'tiny'")
    answer = site.chat(model="gpt-4\x1b[2J")
    refused(answer, 404, "model", r"there is no model 'gpt-4\\x1b\[2J'; this server has 'tiny'")
    assert answer.error["code"] == "model_not_found"
    refused(site.chat(model=3), 400, "model", "model 3 is not text")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_methods_that_are_not_allowed(site: Site, method: str) -> None:
    answer = site.send(CHAT, method=method)
    refused(answer, 405, None, f"{method} is not allowed")
    assert answer.headers["allow"] == "POST"


def test_a_long_method_is_cut(site: Site) -> None:
    refused(site.send(CHAT, method="X" * 20_000), 405, None, "^X{39}… is not allowed at this address$")


# -- errors of the server ------------------------------------------------------------------------------------


def test_an_error_of_ours_says_nothing(
    site: Site, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before an answer begins and while it is written, and the next request is served."""
    from vtp.runtime.generation.answer import Answer as Writing
    from vtp.runtime.pipeline import Pipeline

    secret = "/home/someone/bundle at 0x7f0000001234"
    asked = [shown(picture), words("how many ?")]
    for owner, name in ((Pipeline, "prepare"), (Writing, "begin")):
        with monkeypatch.context() as patch:

            def broken(*arguments: Any, **more: Any) -> Any:
                raise RuntimeError(secret)

            patch.setattr(owner, name, broken)
            for stream in (False, True):
                caplog.clear()
                answer = site.chat(asked, stream=stream)
                assert (answer.status, answer.error["message"]) == (500, FAILED)
                assert answer.error["type"] == "server_error" and b"home" not in answer.content
                assert secret in caplog.text and "Traceback" in caplog.text
        assert site.chat(asked, max_tokens=2).status == 200


SECRETS = [
    "cannot read /home/me/bundle/manifest.json",
    "no such file: '/etc/passwd'",
    "give ./bundle",
    "in ~/models",
    r"C:\models\a.onnx is not there",
    "<Image at 0x7f1234567890>",
    "connection to 192.168.1.7 was refused",
    "see https://example.org",
    "../up is not there",
]
HARMLESS = [
    "the user's text holds '</s>', a control token of this model",
    "give PNG or JPEG, and/or WebP",
    "keep_tokens 4 is not in this bundle, which holds 3, 6; choose one of them",
    "the prompt has 300 tokens; export with a larger --max-length",
    "it may be 1/2 or 3 / 4, 0x12 or 1.2.3",
]


@pytest.mark.parametrize("text", SECRETS)
def test_paths_and_addresses_are_not_passed_on(text: str) -> None:
    assert not holds_no_secret(text)
    error = told(UsageError(text))
    assert error.status == 400 and error.message == "this request cannot be served; the server's log says why"


@pytest.mark.parametrize("text", HARMLESS)
def test_texts_without_any_are(text: str) -> None:
    assert holds_no_secret(text)
    assert told(VtpError(text)).message == text
    assert told(VtpError(text), running=True).message == FAILED


# What a client may say about anything, and what looks like something of ours.
OWN_WORDS = [
    "/yes",
    "/home/me",
    "~/models",
    "./a",
    "C:\\models",
    "0x7f1234567890",
    "192.168.1.7",
    "see http://x",
]


@pytest.mark.parametrize("text", OWN_WORDS)
def test_a_client_reads_its_own_words(site: Site, picture: Image.Image, text: str) -> None:
    """In any field, whichever part of the server refuses them."""
    assert not holds_no_secret(text)
    shared = {"type": "choice", "question": "what ?", "options": [text + "s", text + "!"]}
    levels = {"type": "score", "question": "what ?", "levels": [text, text]}
    schema = {"type": "json_schema", "json_schema": {"schema": {"properties": {text: {"type": text}}}}}
    control = text + "</s>"
    for path, fields, quoted in (
        ("/v1/decisions", {"questions": [shared], "labels": "texts"}, text + "s"),
        ("/v1/decisions", {"questions": [levels]}, text),
        ("/v1/decisions", {"questions": [{**shared, "options": [text, text]}]}, text),
        ("/v1/decisions", {"questions": [{**shared, "options": [text, control]}]}, "</s>"),
        (CHAT, {"messages": [{"role": text, "content": "a"}]}, text),
        (CHAT, {"messages": [{"role": "user", "content": control}]}, "</s>"),
        (CHAT, {"messages": [USER], "response_format": schema}, text),
        (CHAT, {"messages": [USER], "vtp": {text: 1}}, text),
        (CHAT, {"messages": [USER], "model": text}, text),
        ("/api/generate", {"prompt": "how many ?", "format": text}, text),
    ):
        answer = site.send(path, fields)
        said = answer.json["error"] if path.startswith("/api/") else answer.error["message"]
        assert answer.status in (400, 404), answer.content
        assert said.isprintable() and (quoted in said or repr(quoted)[1:-1] in said), said


def test_what_a_client_says_opens_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of ours stays ours where a client has guessed it."""
    from vtp.runtime.pipeline import Pipeline

    def broken(*arguments: Any, **more: Any) -> Any:
        raise UsageError("no such file: '/home/me'")

    monkeypatch.setattr(Pipeline, "prepare", broken)
    refused(
        site.chat("/home/me"), 400, "messages", "^this request cannot be served; the server's log says why$"
    )
    assert told(RequestError("'/home/me' is given twice")).message == "'/home/me' is given twice"


@pytest.mark.parametrize(("kind", "lines"), [(UsageError, 4), (RuntimeError, 12)])
def test_a_request_that_is_repeated_does_not_fill_the_log(
    site: Site,
    kind: type[Exception],
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another fault's first line comes all the same."""
    from vtp.runtime.pipeline import Pipeline

    log = logging.getLogger("vtp.serve.refusals")
    monkeypatch.setattr(log, "filters", [Sparing()])

    def broken(*arguments: Any, **more: Any) -> Any:
        raise kind("of /home/me")

    def otherwise(*arguments: Any, **more: Any) -> Any:
        raise kind("of ~/models")

    for wrong, asked in ((broken, 100), (otherwise, 1)):
        monkeypatch.setattr(Pipeline, "prepare", wrong)
        for _ in range(asked):
            assert site.chat("how many ?").status == (400 if kind is UsageError else 500)
    told_of = [one.getMessage() for one in caplog.records if one.name == log.name]
    first = "a request was refused: of " if kind is UsageError else "a request failed: RuntimeError: of "
    assert told_of[0] == f"{first}/home/me" and told_of[-1] == f"{first}~/models"
    assert told_of[-2] == f"{first}/home/me (100 times so far)"
    assert len(told_of) == lines


def test_errors_of_the_api_stay_what_they_are() -> None:
    error = ApiError("no", 418)
    assert told(error) is error
    assert json.loads(json.dumps(error.body()))["error"]["type"] == "invalid_request_error"
