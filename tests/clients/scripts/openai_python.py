"""openai python: whole answers, streams, asyncio, errors as its own classes, a stream that is left early."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path
from typing import Any

import openai

TASK = json.loads(os.environ["VTP_TASK"])
BASE = TASK["url"] + "/v1"
PICTURE = "data:image/png;base64," + base64.b64encode(Path(TASK["picture"]).read_bytes()).decode()
SHOWN = {"type": "image_url", "image_url": {"url": PICTURE}}
WORDS = {"type": "text", "text": TASK["prompt"]}
BAD_FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "string"}}}}
client = openai.OpenAI(base_url=BASE, api_key="EMPTY", max_retries=0)


def asked(model: str, content: Any = None, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content or [SHOWN, WORDS]}]
    return {"model": model, "messages": turns, "max_tokens": TASK["max_tokens"], **more}


def whole(**fields: Any) -> str:
    return client.chat.completions.create(**fields).choices[0].message.content


def streamed(**fields: Any) -> list[Any]:
    options = {"include_usage": True}
    return list(client.chat.completions.create(stream=True, stream_options=options, **fields))


async def awaited(model: str, count: int) -> list[str]:
    """Several at once, with the client for asyncio."""
    async with openai.AsyncOpenAI(base_url=BASE, api_key="EMPTY", max_retries=0) as several:
        made = [several.chat.completions.create(**asked(model)) for _ in range(count)]
        return [one.choices[0].message.content for one in await asyncio.gather(*made)]


def refused(**fields: Any) -> list[Any]:
    """The client's own class of error, and what it read of the body."""
    try:
        client.chat.completions.create(**fields)
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.param]
    return ["nothing"]


def of_model(model: str) -> tuple[dict[str, str], dict[str, Any]]:
    chunks = streamed(**asked(model))
    text = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    done = client.chat.completions.create(**asked(model, seed=1, temperature=0, stop=None, n=1))
    low = client.chat.completions.create(
        **asked(model, [{**SHOWN, "image_url": {"url": PICTURE, "detail": "low"}}, WORDS])
    )
    with client.chat.completions.create(stream=True, **asked(model)) as left:
        next(iter(left))
    newer = asked(model)
    newer["max_completion_tokens"] = newer.pop("max_tokens")
    answers = {
        "whole": done.choices[0].message.content,
        "stream": "".join(text),
        "max_completion_tokens": whole(**newer),
        "text only": whole(**asked(model, TASK["prompt"])),
        "text first": whole(**asked(model, [WORDS, SHOWN])),
        **{f"async {place}": text for place, text in enumerate(asyncio.run(awaited(model, 5)))},
    }
    facts = {
        "usage": [done.usage.prompt_tokens, done.usage.completion_tokens],
        "stream's usage": [chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens],
        "finish": done.choices[0].finish_reason,
        "stream's finish": chunks[-2].choices[0].finish_reason,
        "visual": list(done.model_extra["vtp"]["visual_tokens"].values()),
        "detail low": low.model_extra["vtp"]["visual_tokens"]["after"],
        "pieces": sum(map(bool, text)),
    }
    return answers, facts


def objects(model: str) -> dict[str, Any]:
    """JSON of a schema, whole and streamed."""
    form = {"type": "json_schema", "json_schema": {"name": "seen", "strict": True, "schema": TASK["schema"]}}
    fields = {**asked(model, response_format=form), "max_tokens": TASK["max_tokens_of_form"]}
    chunks = [chunk for chunk in streamed(**fields) if chunk.choices]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return {"response_format": json.loads(whole(**fields)), "streamed": json.loads(text)}


def errors(model: str) -> dict[str, Any]:
    bad = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    return {
        "unknown model": refused(**asked("no-such-model")),
        "n 2": refused(**asked(model, n=2)),
        "bad picture": refused(**asked(model, [bad, WORDS])),
        "long prompt": refused(**asked(model, [SHOWN, {"type": "text", "text": "word " * 5000}])),
        "keep 1000": whole_or_refused(model),
        "bad schema": refused(**asked(model, response_format=BAD_FORM)),
    }


def whole_or_refused(model: str) -> list[Any]:
    return refused(**asked(model, extra_body={"vtp": {"keep_tokens": 1000}}))


found = {model: of_model(model) for model in TASK["models"]}
print(
    json.dumps(
        {
            "answers": {model: answers for model, (answers, _) in found.items()},
            "facts": {model: facts for model, (_, facts) in found.items()},
            "models": [model.id for model in client.models.list()],
            "errors": errors(TASK["models"][0]),
            "objects": {model: objects(model) for model in TASK["models"] if TASK["schema"]},
        }
    )
)
