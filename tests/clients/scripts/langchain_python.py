"""langchain-openai: invoke, stream, batch, and with_structured_output where the server constrains answers."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

TASK = json.loads(os.environ["VTP_TASK"])
PICTURE = "data:image/png;base64," + base64.b64encode(Path(TASK["picture"]).read_bytes()).decode()
TURNS = [
    HumanMessage(
        content=[
            {"type": "image_url", "image_url": {"url": PICTURE}},
            {"type": "text", "text": TASK["prompt"]},
        ]
    )
]


def chat(model: str, most: int = TASK["max_tokens"]) -> ChatOpenAI:
    return ChatOpenAI(
        model=model, base_url=TASK["url"] + "/v1", api_key="EMPTY", max_tokens=most, max_retries=0
    )


def of_model(model: str) -> tuple[dict[str, str], dict[str, Any]]:
    done = chat(model).invoke(TURNS)
    pieces = [piece.content for piece in chat(model).stream(TURNS)]
    several = chat(model).batch([TURNS] * 3)
    answers = {
        "invoke": done.content,
        "stream": "".join(pieces),
        **{f"batch {place}": one.content for place, one in enumerate(several)},
    }
    facts = {
        "usage": [done.usage_metadata["input_tokens"], done.usage_metadata["output_tokens"]],
        "finish": done.response_metadata["finish_reason"],
        "pieces": sum(map(bool, pieces)),
    }
    return answers, facts


def objects(model: str) -> dict[str, Any]:
    """As it is by default, and as its documentation has it for strict schemas."""
    asked = chat(model, TASK["max_tokens_of_form"])
    strict = {"method": "json_schema", "strict": True}
    return {
        "with_structured_output": asked.with_structured_output(TASK["schema"]).invoke(TURNS),
        "strict": asked.with_structured_output(TASK["schema"], **strict).invoke(TURNS),
    }


found = {model: of_model(model) for model in TASK["models"]}
report: dict[str, Any] = {
    "answers": {model: answers for model, (answers, _) in found.items()},
    "facts": {model: facts for model, (_, facts) in found.items()},
}
if TASK["schema"]:
    report["objects"] = {model: objects(model) for model in TASK["models"]}
print(json.dumps(report))
