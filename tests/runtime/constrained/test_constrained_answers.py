"""Answers of a form, end to end: in every way to ask, beside others, and without a change to those."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.export.exporter import Request, export
from vtp.runtime import Pipeline, Result
from vtp.runtime.constrained.constraint import Constraint
from vtp.runtime.scheduler import Scheduler
from vtp.scenes.exam import held_out
from vtp.scenes.generator.pictures import COLORS, SHAPES

from ...once import Once
from .writing import REVIEW, check

PROMPT = "what shape is the red ?"
# What a random model ends within a tiny bundle's 100 tokens.
SHORT: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"enum": ["red", "blue"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a", "n"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": {"name": "short", "schema": SHORT, "strict": True}}


@pytest.fixture(scope="module")
def builtin(once: Once) -> Iterator[Pipeline]:
    """The built-in model, unpruned."""
    folder: Path = once.folder("builtin-none", lambda part: export(Request(part, method="none")))
    with Pipeline.load(folder, threads=1, vision_feature_cache=2) as pipeline:
        yield pipeline


def told(result: Result) -> tuple[Any, ...]:
    return result.token_ids, result.raw_text, result.finish_reason


def test_the_built_in_model_writes_what_was_asked_for(builtin: Pipeline) -> None:
    """It never saw a quotation mark, so only the form is known beforehand."""
    words = {"shape": list(SHAPES), "color": list(COLORS)}
    for item in (one for one in held_out(16, seed=7) if one.kind in words):
        schema = {
            "type": "object",
            "properties": {"answer": {"enum": words[item.kind]}},
            "required": ["answer"],
            "additionalProperties": False,
        }
        result = builtin.generate(item.image, item.prompt, max_new_tokens=90, response_format=schema)
        assert result.finish_reason in ("stop", "eos")
        assert set(check(result.raw_text, schema)) == {"answer"}


@pytest.mark.parametrize("seed", range(4))
def test_reviews_of_a_model_that_knows_none(builtin: Pipeline, seed: int) -> None:
    """Sampled hot, so that it ends; what does end is a review."""
    item = next(iter(held_out(1, seed=3)))
    result = builtin.generate(
        item.image, item.prompt, max_new_tokens=360, response_format=REVIEW, temperature=3.0, seed=seed
    )
    assert result.finish_reason in ("stop", "eos", "length")
    if result.finish_reason != "length":
        check(result.raw_text, REVIEW)


@pytest.mark.parametrize("name", ["vispruner", "adaptprune", "qwen2", "float16"])
def test_every_kind_of_bundle(exported: Callable[[str], Any], picture: Image.Image, name: str) -> None:
    with Pipeline.load(exported(name).folder, threads=1) as pipe:
        for options in ({}, {"temperature": 1.5, "seed": 3}, {"repetition_penalty": 1.5}):
            plain = pipe.generate(picture, PROMPT, max_new_tokens=20, **options)
            result = pipe.generate(picture, PROMPT, max_new_tokens=90, response_format=JSON, **options)
            assert result.finish_reason in ("stop", "eos"), result.raw_text
            check(result.raw_text, SHORT)
            assert told(pipe.generate(picture, PROMPT, max_new_tokens=20, **options)) == told(plain)


def test_the_rules_of_the_model_give_way(endless: Pipeline, picture: Image.Image) -> None:
    """Bans and forced ends would leave nothing to choose; a model without an end token still ends."""
    info = endless.manifest.generation
    tokenizer = endless._prompter.tokenizer
    banned = tuple(tokenizer.token_to_id(sign) for sign in '{}":')
    try:
        endless.manifest.__dict__["generation"] = replace(
            info, suppress_tokens=banned, forced_eos_token_id=(5,), min_new_tokens=50
        )
        result = endless.generate(picture, PROMPT, max_new_tokens=90, response_format=JSON)
        assert result.finish_reason == "stop"
        check(result.raw_text, SHORT)
    finally:
        endless.manifest.__dict__["generation"] = info


def test_every_way_to_ask_says_the_same(pipe: Pipeline, picture: Image.Image) -> None:
    options: dict[str, Any] = {"max_new_tokens": 90, "response_format": JSON, "logprobs": 2}
    wanted, plain = pipe.generate(picture, PROMPT, **options), pipe.generate(picture, PROMPT)
    check(wanted.raw_text, SHORT)
    assert wanted.logprobs and "".join(entry.token for entry in wanted.logprobs) == wanted.raw_text
    stream = pipe.stream(picture, PROMPT, **options)
    assert "".join(stream) == wanted.raw_text and told(stream.result) == told(wanted)
    for result in pipe.generate_batch([picture] * 3, [PROMPT, "how many ?", PROMPT], **options):
        check(result.raw_text, SHORT)
    with Scheduler(pipe, slots=3) as scheduler:
        tickets = [scheduler.submit(picture, PROMPT, **(options if place % 2 else {})) for place in range(8)]
        decision = scheduler.decide(picture, "which ?", ["red", "blue"])
        results = [ticket.result(60) for ticket in tickets]
        assert decision.result(60).answer
    assert [told(result) for result in results] == [told(plain), told(wanted)] * 4


def test_cut_short(pipe: Pipeline, picture: Image.Image) -> None:
    result = pipe.generate(picture, PROMPT, max_new_tokens=4, response_format=JSON)
    assert result.finish_reason == "length" and result.raw_text.startswith("{")


def test_a_form_that_breaks_ends_its_request_alone(
    pipe: Pipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pipe.generate(picture, PROMPT, max_new_tokens=30)
    real, calls = Constraint.add, []

    class PanicException(BaseException):
        pass

    def broken(self: Constraint, token: int) -> None:
        calls.append(token)
        if len(calls) == 5:
            monkeypatch.setattr(self, "_matcher", Broken())
        real(self, token)

    class Broken:
        def consume_token(self, token: int) -> None:
            raise PanicException("index out of bounds: the len is 3")

    monkeypatch.setattr(Constraint, "add", broken)
    with Scheduler(pipe, slots=3) as scheduler:
        beside = [scheduler.submit(picture, PROMPT, max_new_tokens=30) for _ in range(2)]
        held = scheduler.submit(picture, PROMPT, max_new_tokens=30, response_format=JSON)
        with pytest.raises(VtpError, match="the answer's form cannot be held: index out of bounds"):
            held.result(60)
        assert [told(ticket.result(60)) for ticket in beside] == [told(plain)] * 2
        monkeypatch.undo()
        check(scheduler.submit(picture, PROMPT, response_format=JSON).result(60).raw_text, SHORT)


def test_bad_schemas_are_refused_at_once(pipe: Pipeline, picture: Image.Image) -> None:
    with Scheduler(pipe, slots=1) as scheduler:
        for bad in ({"type": "strng"}, {"allOf": [{}] * 9}, 5, {"type": "json_schema"}):
            with pytest.raises(UsageError, match="response_format"):
                scheduler.submit(picture, PROMPT, response_format=bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="prompt 1 of 1: response_format"):
        pipe.generate_batch([picture], [PROMPT], response_format={"type": "strng"})
