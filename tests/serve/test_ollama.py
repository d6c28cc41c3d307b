"""Ollama's endpoints over real HTTP: the answers are those of the pipeline, in the form its clients read."""

from __future__ import annotations

import base64
import dataclasses
import json
from datetime import datetime
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vtp.runtime import Pipeline
from vtp.serve.http.ollama.answers import Writer, details
from vtp.serve.settings import Settings

from ..stand_ins.prompt_gate import Gate
from .client import Answer, Site, serving, wait_until

CHAT, GENERATE = "/api/chat", "/api/generate"
FIGURES = (
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
)


def encoded(picture: Image.Image) -> str:
    file = BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def lines(answer: Answer) -> list[Any]:
    assert answer.status == 200, answer.content
    assert answer.headers["content-type"] == "application/x-ndjson" and answer.content.endswith(b"\n")
    return [json.loads(line) for line in answer.content.splitlines()]


def text_of(line: Any) -> str:
    text: str = line["response"] if "response" in line else line["message"]["content"]
    return text


def chat_body(picture: Image.Image, text: str = "how many ?", **more: Any) -> dict[str, Any]:
    turn = {"role": "user", "content": text, "images": [encoded(picture)]}
    return {"model": "tiny", "messages": [turn], **more}


def generate_body(picture: Image.Image, text: str = "how many ?", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": text, "images": [encoded(picture)], **more}


BODIES = [(CHAT, chat_body), (GENERATE, generate_body)]
OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"max_new_tokens": 200}),
    ({"options": {"num_predict": -1}}, {"max_new_tokens": 200}),
    ({"options": {"num_predict": 9}, "keep_alive": -1.0, "tools": [], "format": ""}, {"max_new_tokens": 9}),
    (
        {"options": {"num_predict": 20, "temperature": 1.2, "top_p": 0.9, "seed": 7, "top_k": 40}},
        {"max_new_tokens": 20, "temperature": 1.2, "top_p": 0.9, "seed": 7},
    ),
    (
        {"options": {"num_predict": 20, "stop": ["zz", "o"], "num_ctx": 4096}},
        {"max_new_tokens": 20, "stop": ["zz", "o"]},
    ),
    (
        {"options": {"num_predict": 12, "repeat_penalty": 1.4}},
        {"max_new_tokens": 12, "repetition_penalty": 1.4},
    ),
    ({"options": {"num_predict": 12}, "vtp": {"keep_tokens": 3}}, {"max_new_tokens": 12, "keep_tokens": 3}),
    ({"options": None, "think": False, "format": None, "template": "{{x}}"}, {"max_new_tokens": 200}),
]


@pytest.mark.parametrize(("fields", "options"), OPTIONS)
@pytest.mark.parametrize(("path", "body"), BODIES)
def test_answers_are_the_pipelines(
    site: Site, alone: Pipeline, picture: Image.Image, path: str, body: Any, fields: Any, options: Any
) -> None:
    wanted = alone.generate(picture, "how many ?", **options)
    answer = site.send(path, body(picture, stream=False, **fields))
    assert answer.status == 200, answer.content
    assert answer.headers["content-type"] == "application/json"
    *pieces, last = lines(site.send(path, body(picture, **fields)))
    assert "".join(map(text_of, pieces)) == text_of(answer.json) == wanted.raw_text
    assert text_of(last) == "" and not any(piece["done"] for piece in pieces)
    for one in (answer.json, last):
        assert one["done"] is True and one["model"] == "tiny"
        assert one["done_reason"] == {"eos": "stop"}.get(wanted.finish_reason, wanted.finish_reason)
        assert one["eval_count"] == len(wanted.token_ids)
        assert one["prompt_eval_count"] == wanted.prompt_tokens + wanted.visual_tokens.after
        assert one["vtp"]["visual_tokens"] == {"before": 16, "after": wanted.visual_tokens.after}
        assert all(type(one[name]) is int and one[name] >= 0 for name in FIGURES)
        assert one["total_duration"] >= one["prompt_eval_duration"] + one["eval_duration"] > 1000
    assert all(piece.keys() == {"model", "created_at", "done", *_keys(path)} for piece in pieces)


def _keys(path: str) -> set[str]:
    return {"message"} if path == CHAT else {"response"}


def test_every_line_says_when(site: Site, picture: Image.Image) -> None:
    times = [line["created_at"] for line in lines(site.send(CHAT, chat_body(picture)))]
    assert all(time.endswith("Z") for time in times) and times == sorted(times)
    assert all(datetime.fromisoformat(time.removesuffix("Z")) for time in times)


def test_turns_are_the_pipelines(site: Site, alone: Pipeline, picture: Image.Image) -> None:
    """Several turns, a picture in the first, its place before the text."""
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]},
        {"role": "assistant", "content": "a star"},
        {"role": "user", "content": "how many ?"},
    ]
    wanted = alone.generate([picture], messages=turns, max_new_tokens=9)
    sent = [{"role": "user", "content": "what is it ?", "images": [encoded(picture)]}, *turns[1:]]
    body = {"model": "tiny", "messages": sent, "stream": False, "options": {"num_predict": 9}}
    assert text_of(site.send(CHAT, body).json) == wanted.raw_text


def test_a_system_text_is_a_turn(site: Site, picture: Image.Image) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "how many ?", "images": [encoded(picture)]},
    ]
    options = {"num_predict": 9}
    chat = site.send(CHAT, {"model": "tiny", "messages": turns, "stream": False, "options": options})
    generated = site.send(GENERATE, generate_body(picture, system="be brief", stream=False, options=options))
    assert text_of(chat.json) == text_of(generated.json)
    assert chat.json["prompt_eval_count"] == generated.json["prompt_eval_count"]


@pytest.mark.parametrize("name", ["tiny", "tiny:latest"])
def test_names_with_and_without_latest(site: Site, picture: Image.Image, name: str) -> None:
    body = {**chat_body(picture, stream=False, options={"num_predict": 2}), "model": name}
    assert site.send(CHAT, body).json["model"] == name
    assert site.send("/api/show", {"model": name}).status == 200
    assert site.send("/api/show", {"name": name}).status == 200
    assert lines(site.send("/api/pull", {"model": name})) == [{"status": "success"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": []}),
        (CHAT, {}),
        (GENERATE, {}),
        (GENERATE, {"prompt": ""}),
        (GENERATE, {"prompt": None}),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_an_empty_request_loads(site: Site, path: str, body: dict[str, Any], stream: bool) -> None:
    answer = site.send(path, {"model": "tiny", "stream": stream, "keep_alive": 0, **body})
    assert answer.status == 200
    assert (answer.json["done"], answer.json["done_reason"], text_of(answer.json)) == (True, "load", "")


# -- models --------------------------------------------------------------------------------------------------


def test_models_are_listed(site: Site, alone: Pipeline) -> None:
    [entry] = site.send("/api/tags").json["models"]
    assert entry["name"] == entry["model"] == "tiny:latest"
    assert entry["size"] == sum(file.bytes for file in alone.manifest.files.values())
    assert len(entry["digest"]) == 64 and int(entry["digest"], 16)
    assert entry["details"]["family"] == alone.manifest.model.family
    [running] = site.send("/api/ps").json["models"]
    assert running["name"] == "tiny:latest" and running["digest"] == entry["digest"]
    assert datetime.fromisoformat(running["expires_at"].removesuffix("Z"))


def test_a_model_says_what_it_can(site: Site, alone: Pipeline) -> None:
    shown = site.send("/api/show", {"model": "tiny"}).json
    assert shown["capabilities"] == ["completion", "vision"]
    family = shown["model_info"]["general.architecture"]
    # 128 places, of which 16 visual tokens were to take as many, and 6 of them are kept at most
    assert shown["model_info"][f"{family}.context_length"] == 128 - 16 + 6
    assert shown["details"]["format"] == "onnx"


@pytest.mark.parametrize(
    ("quantization", "level"),
    [
        ({}, "F32"),
        ({"vision": "int8", "decoder": "int4", "prompt": "int8"}, "Q4"),
        ({"vision": "none", "decoder": "int8"}, "Q8"),
        ({"vision": "int8", "decoder": "none"}, "F32"),
        ({"decoder": ["int4"]}, "F32"),
    ],
)
def test_the_bits_of_a_model_are_its_decoder_s(
    alone: Pipeline, quantization: dict[str, Any], level: str
) -> None:
    manifest = dataclasses.replace(alone.manifest, quantization=quantization)
    model: Any = SimpleNamespace(manifest=manifest)
    assert details(model)["quantization_level"] == level


def test_the_server_is_there(site: Site) -> None:
    answer = site.send("/", method="HEAD")
    assert (answer.status, answer.content) == (200, b"")
    version = site.send("/api/version").json["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)


# -- what is refused -----------------------------------------------------------------------------------------

BAD: list[tuple[int, str, Any, str]] = [
    (400, CHAT, b"{", "JSON"),
    (400, CHAT, [], "JSON object"),
    (404, CHAT, {"model": "llava", "messages": []}, "llava"),
    (404, "/api/show", {"model": "llava"}, "llava"),
    (404, "/api/pull", {"model": "llava"}, "llava"),
    (400, "/api/show", {}, "model"),
    (400, CHAT, {"model": 3}, "model"),
    (400, CHAT, {"stream": "yes"}, "stream"),
    (400, CHAT, {"messages": {}}, "messages"),
    (400, CHAT, {"messages": [3]}, "messages.0"),
    (400, CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    (400, CHAT, {"messages": [{"content": "x"}]}, "messages.0.role"),
    (400, CHAT, {"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content"),
    (400, CHAT, {"messages": [{"role": "user", "content": "x", "images": "AAAA"}]}, "messages.0.images"),
    (400, CHAT, {"messages": [{"role": "user", "content": "x", "images": [3]}]}, "messages.0.images.0"),
    (400, CHAT, {"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]}, "not a picture"),
    (400, CHAT, {"messages": [{"role": "user", "content": "x", "images": ["*"]}]}, "base64"),
    (400, CHAT, {"messages": [{"role": "user", "content": "x", "images": ["http://a.test/"]}]}, "base64"),
    (400, CHAT, {"messages": [{"role": "assistant", "content": "x", "images": ["AAAA"]}]}, "only user turns"),
    (400, CHAT, {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool_calls"),
    (400, CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (400, CHAT, {"think": True}, "think"),
    (400, CHAT, {"format": 3}, "format"),
    (400, CHAT, {"format": "xml"}, "format"),
    (400, CHAT, {"options": []}, "options"),
    (400, CHAT, {"options": {"temperature": "hot"}}, "options.temperature"),
    (400, CHAT, {"options": {"top_p": 2}}, "options.top_p"),
    (400, CHAT, {"options": {"num_predict": 1.5}}, "options.num_predict"),
    (400, CHAT, {"options": {"seed": 1.5}}, "options.seed"),
    (400, CHAT, {"options": {"stop": 3}}, "stop"),
    (400, CHAT, {"vtp": {"keep": 3}}, "vtp"),
    (400, GENERATE, {"prompt": 3}, "prompt"),
    (400, GENERATE, {"prompt": "x", "raw": True}, "raw"),
    (400, GENERATE, {"prompt": "x", "suffix": "y"}, "suffix"),
    (400, GENERATE, {"prompt": "x", "images": [None]}, "images.0"),
    (404, "/api/embed", {"model": "tiny"}, "there is nothing at this address"),
    (405, "/api/tags", {}, "not allowed"),
]


@pytest.mark.parametrize(("status", "path", "body", "part"), BAD)
def test_refusals_have_ollamas_form(site: Site, status: int, path: str, body: Any, part: str) -> None:
    answer = site.send(path, body)
    assert answer.status == status, answer.content
    assert answer.json.keys() == {"error"} and "\n" not in answer.json["error"]
    assert part in answer.json["error"]


def test_a_prompt_past_the_cache_is_refused_with_both_numbers(site: Site, picture: Image.Image) -> None:
    answer = site.send(GENERATE, generate_body(picture, "x " * 500))
    assert (
        answer.status == 400
        and "1008 tokens" in answer.json["error"]
        and "room for 111" in answer.json["error"]
    )


def test_refusals_at_the_door_have_ollamas_form() -> None:
    with serving({}, Settings(key="k", body_bytes=100)) as locked:
        for answer, status in (
            (locked.send("/api/tags"), 401),
            (locked.send("/api/tags", headers={"Host": "evil.test"}), 403),
            (locked.send(CHAT, b"x" * 101, headers={"Authorization": "Bearer k"}), 413),
        ):
            assert answer.status == status and isinstance(answer.json["error"], str)
        assert locked.send("/", method="HEAD").status == 200
        assert isinstance(locked.send("/v1/models").json["error"], dict)


def test_what_goes_wrong_in_a_stream_is_its_last_line(
    site: Site, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("at 0x7f0000000000 in /secret")

    monkeypatch.setattr(Writer, "end", fail)
    *pieces, last = lines(site.send(CHAT, chat_body(picture)))
    assert pieces and last.keys() == {"error"}
    assert "secret" not in last["error"] and "0x7f" not in last["error"]


def test_a_client_that_goes_away_is_cancelled(
    site: Site, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three that wait or run, streamed or not, none is answered."""
    [scheduler] = site.models.schedulers.values()
    before = scheduler.stats()
    gate = Gate(monkeypatch)
    bodies = [chat_body(picture, stream=stream) for stream in (True, False, True)]
    connections = [site.open_raw(body, CHAT) for body in bodies]
    gate.entered.acquire()
    wait_until(lambda: scheduler.stats().running + scheduler.stats().waiting == 3)
    for connection in connections:
        connection.close()
    wait_until(lambda: scheduler.stats().waiting == 0)
    gate.open()
    wait_until(lambda: scheduler.stats().requests == before.requests + 3)
    assert scheduler.stats().cancelled == before.cancelled + 3
    assert site.send(CHAT, chat_body(picture)).status == 200
