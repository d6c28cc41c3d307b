"""ollama python: list, show, ps, chat and generate, streamed or not, asyncio, errors."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import ollama

TASK = json.loads(os.environ["VTP_TASK"])
OPTIONS = {"num_predict": TASK["max_tokens"], "temperature": 0, "seed": 1}
client = ollama.Client(host=TASK["url"])


def turns() -> list[dict[str, Any]]:
    return [{"role": "user", "content": TASK["prompt"], "images": [TASK["picture"]]}]


def of_model(model: str) -> tuple[dict[str, str], dict[str, Any]]:
    data = Path(TASK["picture"]).read_bytes()
    done = client.chat(model, turns(), options=OPTIONS)
    pieces = list(client.chat(model, turns(), stream=True, options=OPTIONS, keep_alive=-1.0))
    made = client.generate(model, TASK["prompt"], images=[data], options=OPTIONS)
    parts = list(client.generate(model, TASK["prompt"], images=[data], stream=True, options=OPTIONS))
    answers = {
        "chat": done.message.content,
        "chat stream": "".join(one.message.content for one in pieces),
        "text only": client.generate(model, TASK["prompt"], options=OPTIONS).response,
        "generate": made.response,
        "generate stream": "".join(one.response for one in parts),
        "async": asyncio.run(awaited(model)),
        ":latest": client.chat(f"{model}:latest", turns(), options=OPTIONS).message.content,
    }
    shown = client.show(model)
    facts = {
        "usage": [done.prompt_eval_count, done.eval_count],
        "stream's usage": [pieces[-1].prompt_eval_count, pieces[-1].eval_count],
        "finish": done.done_reason,
        "stream's finish": parts[-1].done_reason,
        "pieces": len(pieces) - 1,
        "capabilities": shown.capabilities,
        "context": next(size for name, size in shown.modelinfo.items() if name.endswith(".context_length")),
        "load": client.generate(model, "").done_reason,
    }
    return answers, facts


def objects(model: str) -> dict[str, Any]:
    """JSON of a schema, by `format`."""
    options = {**OPTIONS, "num_predict": TASK["max_tokens_of_form"]}
    done = client.chat(model, turns(), format=TASK["schema"], options=options)
    made = client.generate(
        model, TASK["prompt"], images=[TASK["picture"]], format=TASK["schema"], options=options
    )
    return {"chat": json.loads(done.message.content), "generate": json.loads(made.response)}


async def awaited(model: str) -> str:
    text = ""
    async for part in await ollama.AsyncClient(host=TASK["url"]).chat(
        model, turns(), stream=True, options=OPTIONS
    ):
        text += part.message.content
    return text


def refused(model: str, **fields: Any) -> list[Any]:
    try:
        client.chat(model, **fields)
    except ollama.ResponseError as error:
        return [type(error).__name__, error.status_code, "{" not in error.error]
    return ["nothing"]


found = {model: of_model(model) for model in TASK["models"]}
first = TASK["models"][0]
print(
    json.dumps(
        {
            "answers": {model: answers for model, (answers, _) in found.items()},
            "facts": {model: facts for model, (_, facts) in found.items()},
            "objects": {model: objects(model) for model in TASK["models"] if TASK["schema"]},
            "models": [one.model.removesuffix(":latest") for one in client.list().models],
            "running": [one.model.removesuffix(":latest") for one in client.ps().models],
            "errors": {
                "unknown model": refused("no-such-model", messages=turns()),
                "bad picture": refused(first, messages=[{"role": "user", "content": "x", "images": [b"no"]}]),
            },
        }
    )
)
