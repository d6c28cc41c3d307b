"""POST /v1/decisions over real HTTP: the pipeline's decisions in SGLang's form; bad input is one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from vtp.runtime import Pipeline
from vtp.runtime.scheduler import Scheduler
from vtp.serve.http.decisions.request import MOST_QUESTIONS, read_decisions
from vtp.serve.http.fields import Fields

from ..stand_ins.prompt_gate import Gate
from .client import Answer, Site, data_url, serving, wait_until

PATH = "/v1/decisions"
CHOICE = {"type": "choice", "question": "what is it ?", "options": ["red", "blue"]}


def ask(site: Site, picture: Image.Image, questions: Any, **more: Any) -> Answer:
    return site.send(PATH, {"images": [data_url(picture)], "questions": questions, **more})


@pytest.fixture(scope="module")
def caching(exported: Callable[[str], Any]) -> Iterator[Site]:
    """A server that remembers what the vision stages gave."""
    options: dict[str, Any] = {"threads": 1, "slots": 2, "queue": 4, "vision_feature_cache": 2}
    with (
        Scheduler.load(exported("vispruner").folder, **options) as scheduler,
        serving({"tiny": scheduler}) as running,
    ):
        yield running


# -- equal decisions -----------------------------------------------------------------------------------------


def test_decisions_are_the_pipelines(caching: Site, alone: Pipeline, picture: Image.Image) -> None:
    """More questions than slots, of several kinds; the encoder runs once for all of them."""
    questions = [
        CHOICE,
        {**CHOICE, "id": "again", "options": [{"name": "red", "description": "as blood"}, {"name": "blue"}]},
        {"type": "score", "question": "how red ?", "levels": ["not", "a little", "very"], "id": "redness"},
        {**CHOICE, "id": "json", "question": {"what": "it"}},
    ]
    answer = ask(caching, picture, questions, model="tiny", input="Look.", unknown=1)
    assert answer.status == 200, answer.content
    body = answer.json
    assert body["object"] == "decisions" and body["model"] == "tiny"
    assert list(body["answers"]) == ["0", "again", "redness", "json"]
    named = {"red": "as blood", "blue": ""}
    wanted = [
        alone.decide(picture, "Look.\n\nwhat is it ?", ["red", "blue"]),
        alone.decide(picture, "Look.\n\nwhat is it ?", named),
        alone.decide(picture, "Look.\n\nhow red ?", ["not", "a little", "very"], kind="score"),
        alone.decide(picture, 'Look.\n\n{"what":"it"}', ["red", "blue"]),
    ]
    for place, (said, decision) in enumerate(zip(body["answers"].values(), wanted, strict=True)):
        assert said["type"] == decision.kind and said["answer"] == decision.answer
        assert said["probabilities"] == pytest.approx(decision.probabilities)
        assert said["label_mass"] == pytest.approx(decision.label_mass)
        assert said.get("choice") == (decision.answer if decision.kind == "choice" else None)
        assert said.get("score") == (decision.score and pytest.approx(decision.score))
        assert bool(said["reused_stages"]) == (place > 0)
    total = sum(one.prompt_tokens + one.visual_tokens.after for one in wanted)
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == total
    assert body["usage"]["completion_tokens"] == 0
    assert body["vtp"]["visual_tokens"] == {"before": 16, "after": 6} and body["vtp"]["method"] == "vispruner"


def test_options_hold_for_all_questions(site: Site, alone: Pipeline, picture: Image.Image) -> None:
    for fields, options in [
        ({"vtp": {"keep_tokens": 3}}, {"keep_tokens": 3}),
        ({"temperature": 2.5}, {"temperature": 2.5}),
        ({"labels": "texts"}, {"labels": "texts"}),
    ]:
        said = ask(site, picture, [CHOICE], **fields).json["answers"]["0"]
        wanted = alone.decide(picture, "what is it ?", ["red", "blue"], **options)
        assert said["probabilities"] == pytest.approx(wanted.probabilities)
        assert said["label_mass"] == pytest.approx(wanted.label_mass)
    low = site.send(PATH, {"images": [{"url": data_url(picture), "detail": "low"}], "questions": [CHOICE]})
    assert low.json["vtp"]["visual_tokens"] == {"before": 16, "after": 3}
    part = {"type": "image_url", "image_url": {"url": data_url(picture)}}
    two = site.send(PATH, {"images": [part, data_url(picture)], "questions": [CHOICE]})
    assert two.json["vtp"]["visual_tokens"] == {"before": 32, "after": 12}


def test_they_are_counted(site: Site, picture: Image.Image) -> None:
    def kept() -> float:
        lines = site.send("/metrics").content.decode().splitlines()
        name = 'vtp_visual_tokens_kept_total{model="tiny"} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before = kept()
    assert ask(site, picture, [CHOICE, CHOICE]).status == 200
    assert kept() == before + 12


# -- what is refused -----------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"questions": None}, "questions", "questions is missing or empty"),
    ({"questions": []}, "questions", "questions is missing or empty"),
    ({"questions": "x"}, "questions", "questions 'x' is not a list"),
    (
        {"questions": [CHOICE] * (MOST_QUESTIONS + 1)},
        "questions",
        "questions has 65 entries; give at most 64",
    ),
    ({"questions": [5]}, "questions.0", "questions.0 must be a JSON object, not a number"),
    ({"questions": [{}]}, "questions.0.type", "questions.0.type is missing; give yes_no, choice, score"),
    (
        {"questions": [{**CHOICE, "type": "maybe"}]},
        "questions.0.type",
        "'maybe' is not yes_no or choice or score",
    ),
    (
        {"questions": [{**CHOICE, "question": None}]},
        "questions.0.question",
        "questions.0.question is missing",
    ),
    ({"questions": [{**CHOICE, "question": 5}]}, "questions.0.question", "must be text, not a number"),
    ({"questions": [{**CHOICE, "options": None}]}, "questions.0.options", "is missing; give 2 to 26 texts"),
    ({"questions": [{**CHOICE, "options": {"a": 1}}]}, "questions.0.options", "is not a list"),
    ({"questions": [{**CHOICE, "options": ["a"]}]}, "questions.0", "1 options are given; give 2 to 26"),
    ({"questions": [{**CHOICE, "options": ["a", 5]}]}, "questions.0.options.1", "must be a JSON object"),
    ({"questions": [{**CHOICE, "options": ["a", {}]}]}, "questions.0.options.1", "name is missing"),
    ({"questions": [{**CHOICE, "options": ["a", "a"]}]}, "questions.0.options.1", "'a' is given twice"),
    ({"questions": [CHOICE, {**CHOICE, "id": "0"}]}, "questions.1.id", "'0' is given twice; ids must differ"),
    ({"questions": [{**CHOICE, "id": " "}]}, "questions.0.id", "is blank"),
    ({"questions": [{"type": "score", "question": "x"}]}, "questions.0.levels", "is missing; give 2 to 10"),
    ({"questions": [{"type": "score", "question": "x", "levels": ["a"] * 11}]}, "questions.0", "11 levels"),
    ({"questions": [{**CHOICE, "options": ["<image>", "b"]}]}, "questions.0", "a control token"),
    ({"questions": [CHOICE, {**CHOICE, "question": "x " * 300}]}, "questions.1", "this bundle has room for"),
    ({"images": "x"}, "images", "images 'x' is not a list"),
    ({"images": [5]}, "images.0", "images.0 must be a JSON object, not a number"),
    ({"images": [{}]}, "images.0.url", "images.0.url is missing"),
    ({"images": ["data:image/png;base64,AAAA"]}, "images.0", "picture"),
    ({"images": ["x"]}, "images.0", "the picture's URL has no scheme"),
    ({"temperature": 0}, "temperature", "temperature 0 leaves no probabilities"),
    ({"temperature": 1e9}, "temperature", "is not a number from 0 to 100"),
    ({"temperature": True}, "temperature", "is not a number from 0 to 100"),
    ({"labels": "digits"}, "labels", "is not letters or texts"),
    ({"vtp": {"keep_tokens": 5}}, "vtp.keep_tokens", "keep_tokens 5 is not in this bundle"),
    ({"vtp": {"keep": 3}}, "vtp", "vtp has the unknown field 'keep'"),
]


@pytest.mark.parametrize(("wrong", "param", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_requests(site: Site, picture: Image.Image, wrong: Any, param: str, message: str) -> None:
    answer = site.send(PATH, {"images": [data_url(picture)], "questions": [CHOICE], **wrong})
    assert answer.status == 400, answer.content
    assert answer.error["param"] == param and message in answer.error["message"]
    assert "\n" not in answer.error["message"] and answer.error["type"] == "invalid_request_error"


def test_an_unknown_model_and_other_methods(site: Site, picture: Image.Image) -> None:
    assert ask(site, picture, [CHOICE], model="other").status == 404
    assert site.send(PATH).status == 405
    assert site.send(PATH, b"{").status == 400
    assert site.send(PATH, b"[]").status == 400


def test_what_stands_before_every_question_is_held_once(site: Site) -> None:
    """And refused before it is joined with any if no tokens could hold it."""
    question = {"type": "yes_no", "question": "red ?"}
    asked = read_decisions(Fields({"input": "look at " * 100, "questions": [question] * MOST_QUESTIONS}))
    assert {one.arguments["question"] for one in asked.questions} == {"red ?"}
    assert asked.arguments_of(asked.questions[0])["question"] == "look at " * 100 + "\n\nred ?"
    long = site.send(PATH, {"input": "look at " * 10**6, "questions": [question] * MOST_QUESTIONS})
    assert (long.status, long.error["code"]) == (400, "context_length_exceeded")
    assert long.error["param"] == "questions.0" and "8000005 characters" in long.error["message"]


# -- many at once --------------------------------------------------------------------------------------------


def test_a_client_that_goes_away_leaves_nothing_behind(
    exported: Callable[[str], Any], picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with (
        Scheduler.load(exported("vispruner").folder, threads=1, slots=1, queue=1) as scheduler,
        serving({"tiny": scheduler}) as site,
    ):
        body = {"images": [data_url(picture)], "questions": [CHOICE] * 3}
        first = site.open_raw(body, PATH)
        wait_until(lambda: scheduler.stats().running == 1)
        second = site.open_raw(body, PATH)
        wait_until(lambda: scheduler.stats().waiting == 1)
        full = ask(site, picture, [CHOICE])
        assert full.status == 429 and full.error["code"] == "queue_full" and full.headers["retry-after"]
        second.close()
        wait_until(lambda: scheduler.stats().waiting == 0)
        first.close()
        gone = b'vtp_requests_total{model="tiny",status="499"} 2'
        wait_until(lambda: gone in site.send("/metrics").content)
        gate.open()
        wait_until(lambda: scheduler.stats().running == 0)
        assert ask(site, picture, [CHOICE]).status == 200
        assert scheduler.stats().requests == 3  # the others' further questions never came
    assert json.loads(full.content)["error"]["message"].startswith("the queue is full")
