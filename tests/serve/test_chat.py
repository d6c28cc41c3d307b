"""Chat completions over real HTTP: the answers are those of the pipeline, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from vtp.runtime import NO_PICTURE, Pipeline
from vtp.runtime.media.cut_off import cut_off_line
from vtp.runtime.scheduler import Scheduler

from .client import CHAT, Site, data_url, serving, shown, words

SAMPLED = {"temperature": 1.2, "top_p": 0.9, "seed": 7}


def asked(picture: Image.Image, text: str = "how many ?") -> list[dict[str, Any]]:
    return [shown(picture), words(text)]


# -- equal answers -------------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"max_new_tokens": 200}),
    ({"max_tokens": 9}, {"max_new_tokens": 9}),
    ({"max_tokens": 3, "max_completion_tokens": 7}, {"max_new_tokens": 7}),
    ({"max_tokens": 20, **SAMPLED}, {"max_new_tokens": 20, **SAMPLED}),
    ({"max_tokens": 20, "stop": "e"}, {"max_new_tokens": 20, "stop": "e"}),
    ({"max_tokens": 20, "stop": ["zz", "o"]}, {"max_new_tokens": 20, "stop": ["zz", "o"]}),
    ({"max_tokens": 12, "vtp": {"keep_tokens": 3}}, {"max_new_tokens": 12, "keep_tokens": 3}),
    ({"max_tokens": 12, "repetition_penalty": 1.4}, {"max_new_tokens": 12, "repetition_penalty": 1.4}),
]


@pytest.mark.parametrize(("fields", "options"), OPTIONS)
def test_an_answer_is_the_pipelines(
    site: Site, alone: Pipeline, picture: Image.Image, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    wanted = alone.generate(picture, "how many ?", **options)
    answer = site.chat(asked(picture), **fields)
    assert answer.status == 200, answer.content
    assert answer.text == wanted.raw_text
    body = answer.json
    assert body["object"] == "chat.completion" and body["model"] == "tiny"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["choices"][0]["finish_reason"] == {"eos": "stop"}.get(
        wanted.finish_reason, wanted.finish_reason
    )
    assert body["usage"]["completion_tokens"] == len(wanted.token_ids)
    assert body["usage"]["prompt_tokens"] == wanted.prompt_tokens + wanted.visual_tokens.after
    assert body["usage"]["total_tokens"] == sum(
        body["usage"][name] for name in ("prompt_tokens", "completion_tokens")
    )
    assert body["vtp"]["visual_tokens"] == {"before": 16, "after": wanted.visual_tokens.after}


@pytest.mark.parametrize(("fields", "options"), OPTIONS)
def test_a_stream_is_the_same_answer(
    site: Site, alone: Pipeline, picture: Image.Image, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    wanted = alone.generate(picture, "how many ?", **options)
    answer = site.chat(
        asked(picture), stream=True, stream_options={"include_usage": True, "continuous": 1}, **fields
    )
    assert answer.status == 200 and answer.headers["cache-control"] == "no-cache"
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-encoding" not in answer.headers
    *chunks, usage, end = answer.events
    assert end is None
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == wanted.raw_text
    assert all(delta.keys() == {"content"} for delta in deltas[1:-1])
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[:-1] == [None] * (len(chunks) - 1) and reasons[-1] in ("stop", "length")
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(wanted.token_ids)
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    assert chunks[-1]["vtp"]["visual_tokens"]["after"] == wanted.visual_tokens.after


def test_usage_comes_only_if_asked_for(site: Site, picture: Image.Image) -> None:
    for options in (None, {}, {"include_usage": None}, {"include_usage": False}):
        answer = site.chat(asked(picture), stream=True, stream_options=options, max_tokens=3)
        *chunks, end = answer.events
        assert end is None and not [chunk for chunk in chunks if "usage" in chunk]


def test_timings_are_in_llama_servers_words(site: Site, picture: Image.Image) -> None:
    body = site.chat(asked(picture), max_tokens=8).json
    timings, usage = body["timings"], body["usage"]
    assert timings["cache_n"] == 0 and timings["prompt_n"] == usage["prompt_tokens"]
    assert timings["predicted_n"] == usage["completion_tokens"]
    for name in ("prompt", "predicted"):
        count, ms = timings[f"{name}_n"], timings[f"{name}_ms"]
        assert ms > 0
        assert timings[f"{name}_per_token_ms"] == pytest.approx(ms / count, abs=1e-3)
        assert timings[f"{name}_per_second"] == pytest.approx(1e3 * count / ms, rel=1e-2)
    assert body["vtp"]["method"] == "vispruner" and body["vtp"]["tower"] is None
    assert {"queue", "vision_encoder", "decoder"} <= body["vtp"]["stages"].keys()


@pytest.mark.parametrize("top", [None, 0, 3])
@pytest.mark.parametrize("more", [{}, {"stop": "e"}, {"temperature": 1.5, "seed": 3}])
def test_logprobs_are_the_pipelines(
    site: Site, alone: Pipeline, picture: Image.Image, top: int | None, more: dict[str, Any]
) -> None:
    wanted = alone.generate(picture, "how many ?", max_new_tokens=20, logprobs=top or 0, **more)
    assert wanted.logprobs
    fields = {"max_tokens": 20, "logprobs": True, "top_logprobs": top, **more}
    whole = site.chat(asked(picture), **fields).json["choices"][0]["logprobs"]
    *chunks, end = site.chat(asked(picture), stream=True, **fields).events
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    streamed = [entry for part in parts if part for entry in part["content"]]
    assert end is None and whole["content"] == streamed and whole["refusal"] is None
    for entry, token in zip(streamed, wanted.logprobs, strict=True):
        assert (entry["token"], bytes(entry["bytes"])) == (token.token, token.bytes)
        assert entry["logprob"] == pytest.approx(token.logprob, abs=1e-5)
        assert [other["token"] for other in entry["top_logprobs"]] == [other.token for other in token.top]
    assert len(streamed[0]["top_logprobs"]) == (top or 0)


# -- what clients send ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("details", "kept"), [(["low"], 3), (["high"], 6), (["low", "high"], 12), (["low", "low"], 6)]
)
def test_detail_chooses_the_keep_count(
    site: Site, picture: Image.Image, details: list[str], kept: int
) -> None:
    parts = [shown(picture, detail=detail) for detail in details]
    body = site.chat([*parts, words("what ?")], max_tokens=2).json
    assert body["vtp"]["visual_tokens"] == {"before": 16 * len(details), "after": kept}


def test_an_own_keep_count_beats_detail(site: Site, picture: Image.Image) -> None:
    parts = [shown(picture, detail="low"), words("what ?")]
    body = site.chat(parts, max_tokens=2, vtp={"keep_tokens": 6}).json
    assert body["vtp"]["keep_tokens"] == 6


TURNS: list[list[tuple[str, Any]]] = [
    [("system", "be short"), ("user", "PICTURE what ?")],
    [("developer", "be short"), ("user", "what ? PICTURE")],
    [("user", "PICTURE what ?"), ("assistant", "a star"), ("user", "and now ?")],
    [("user", "PICTURE"), ("user", "what ?"), ("user", "how many ?")],
    [("user", "first PICTURE then PICTURE which ?")],
]


def openai_turns(turns: list[tuple[str, Any]], picture: Image.Image) -> list[dict[str, Any]]:
    return [{"role": role, "content": parts(text, shown(picture), words)} for role, text in turns]


def parts(text: str, picture: Any, say: Any) -> Any:
    """Text in which PICTURE stands for one, as parts; plain text stays."""
    pieces = text.split("PICTURE")
    if len(pieces) == 1:
        return text
    found: list[Any] = []
    for piece in pieces:
        found += [say(piece.strip())] if piece.strip() else []
        found.append(picture)
    return found[:-1]


@pytest.mark.parametrize("turns", TURNS)
def test_conversations_are_asked_as_they_are(
    site: Site, alone: Pipeline, picture: Image.Image, turns: list[tuple[str, Any]]
) -> None:
    """Where the pictures stand, several turns of one role, roles by other names."""
    messages = [
        {
            "role": "system" if role == "developer" else role,
            "content": parts(text, {"type": "image"}, words),
        }
        for role, text in turns
    ]
    pictures = [picture] * sum(text.count("PICTURE") for _, text in turns)
    wanted = alone.generate(pictures, messages=messages, max_new_tokens=12)
    answer = site.send(CHAT, {"messages": openai_turns(turns, picture), "max_tokens": 12})
    assert answer.status == 200, answer.content
    cut = cut_off_line(alone.manifest.image, *picture.size)
    assert answer.text == wanted.raw_text and answer.json["vtp"]["notes"] == [cut]


HARMLESS: list[dict[str, Any]] = [
    {"model": "tiny"},
    {"model": ""},
    {"model": None},
    {"n": 1, "stop": None, "seed": None, "temperature": None, "top_p": None, "stream": None, "vtp": None},
    {"stop": [], "stream_options": None, "tools": [], "tool_choice": "auto", "functions": None},
    {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False},
    {"logprobs": None, "top_logprobs": None, "response_format": None, "modalities": ["text"]},
    {"seed": -1, "user": "me", "metadata": {"a": 1}, "store": False, "frequency_penalty": 0.5},
    {"ignore_eos": True, "keep_alive": -1.0, "something new": {"deep": [1, 2]}, "max_tokens": 5.0},
    {"chat_template": "{{ 1/0 }}", "chat_template_kwargs": {"enable_thinking": False}},
]


@pytest.mark.parametrize("fields", HARMLESS)
def test_what_clients_add_changes_nothing(
    site: Site, alone: Pipeline, picture: Image.Image, fields: dict[str, Any]
) -> None:
    wanted = alone.generate(picture, "how many ?", max_new_tokens=5)
    answer = site.chat(asked(picture), **{"max_tokens": 5, **fields})
    assert answer.status == 200, answer.content
    assert answer.text == wanted.raw_text


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_needs_no_picture(site: Site, alone: Pipeline, stream: bool) -> None:
    wanted = alone.generate(NO_PICTURE, "how many ?", max_new_tokens=9)
    answer = site.chat("how many ?", max_tokens=9, stream=stream)
    body = answer.events[-2] if stream else answer.json
    assert body["vtp"]["visual_tokens"] == {"before": 0, "after": 0} and body["vtp"]["keep_tokens"] == 0
    assert body["timings"]["prompt_n"] == wanted.prompt_tokens
    if not stream:
        assert answer.text == wanted.raw_text


def test_headers_and_types_that_nobody_needs(site: Site, picture: Image.Image) -> None:
    body = {"messages": [{"role": "user", "content": asked(picture), "name": "me"}], "max_tokens": 3}
    wanted = site.send(CHAT, body).text
    for headers in (
        {"Authorization": "Bearer EMPTY"},
        {"Authorization": "Basic eDp5"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json; charset=utf-8", "x-stainless-retry-count": "0"},
    ):
        assert site.send(CHAT, body, headers=headers).text == wanted
    assert site.send("/chat/completions", body).text == wanted


def test_a_picture_url_may_stand_alone(site: Site, picture: Image.Image) -> None:
    bare = {"type": "image_url", "image_url": data_url(picture, "bmp")}
    full = site.chat(asked(picture), max_tokens=5).text
    assert site.chat([bare, words("how many ?")], max_tokens=5).text == full


def test_unknown_fields_are_logged_once(
    site: Site, picture: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        site.chat(asked(picture), max_tokens=1, **{"never\x1bseen": 1})
    assert [record.message for record in caplog.records if "never" in record.message] == [
        "the field never\\x1bseen is not served; it is ignored (noted once)"
    ]


# -- what is served ------------------------------------------------------------------------------------------


def test_models(site: Site) -> None:
    listed = site.send("/v1/models").json
    assert listed == site.send("/models").json
    (card,) = listed["data"]
    assert listed["object"] == "list" and card == site.send("/v1/models/tiny").json
    assert (card["id"], card["object"], card["owned_by"]) == ("tiny", "model", "vtp")
    # 128 places for text and 16 visual tokens, of which 6 are kept at most
    assert card["max_model_len"] == 128 - 16 + 6 and card["created"] > 1.7e9
    assert card["architecture"]["input_modalities"] == card["modalities"] == ["text", "image"]
    assert card["vtp"]["keep_tokens"] == [3, 6] and card["vtp"]["visual_tokens"] == 16
    assert site.send("/v1/models/other").status == 404


def test_health(site: Site) -> None:
    for path in ("/health", "/v1/health", "/health/ready"):
        answer = site.send(path)
        assert (answer.status, answer.json) == (200, {"status": "ok"})


def test_bodies_are_plain_json(site: Site, picture: Image.Image) -> None:
    answer = site.chat(asked(picture), max_tokens=2)
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.content) == answer.json


def test_the_length_that_is_told_is_the_length_that_is_usable(
    exported: Callable[[str], Any], picture: Image.Image
) -> None:
    """A prompt as long as it says is answered, with and without a picture; one token more is too long."""
    with (
        Scheduler.load(exported("adaptprune").folder, threads=1) as scheduler,
        serving({"x": scheduler}) as site,
    ):
        most = site.send("/v1/models/x").json["max_model_len"]
        kept = max(scheduler.pipeline.manifest.visual.keep)
        for pictures in ([], [shown(picture)]):
            ask = [*pictures, words("a")]
            few = site.chat(ask, max_tokens=1).json["usage"]["prompt_tokens"]
            step = site.chat([*pictures, words("a a")], max_tokens=1).json["usage"]["prompt_tokens"] - few
            text = "a" + " a" * ((most - 1 - few) // step)
            answer = site.chat([*pictures, words(text)], max_tokens=1)
            assert (
                answer.status == 200 and most - 1 - step < answer.json["usage"]["prompt_tokens"] <= most - 1
            )
            assert site.chat([*pictures, words(text + " a" * (1 + step))], max_tokens=1).status == 400
        assert kept < most < scheduler.pipeline.manifest.model.max_length
