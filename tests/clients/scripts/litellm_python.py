"""litellm through both of its ways, openai/ and hosted_vllm/: whole answers, streams, errors."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch one
import litellm

TASK = json.loads(os.environ["VTP_TASK"])
PICTURE = "data:image/png;base64," + base64.b64encode(Path(TASK["picture"]).read_bytes()).decode()
CONTENT = [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": TASK["prompt"]}]


def ask(model: str, **more: Any) -> Any:
    return litellm.completion(
        model=model,
        api_base=TASK["url"] + "/v1",
        api_key="EMPTY",
        messages=[{"role": "user", "content": CONTENT}],
        max_tokens=TASK["max_tokens"],
        num_retries=0,
        **more,
    )


def of_model(model: str) -> tuple[dict[str, str], dict[str, Any]]:
    answers, facts = {}, {}
    for way in ("openai", "hosted_vllm"):
        done = ask(f"{way}/{model}")
        chunks = list(ask(f"{way}/{model}", stream=True))
        answers[f"{way} whole"] = done.choices[0].message.content
        answers[f"{way} stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        facts["usage"] = [done.usage.prompt_tokens, done.usage.completion_tokens]
        facts["finish"] = done.choices[0].finish_reason
    return answers, facts


def refused(model: str) -> list[Any]:
    try:
        ask(model)
    except litellm.NotFoundError as error:
        return [type(error).__name__, error.status_code]
    return ["nothing"]


found = {model: of_model(model) for model in TASK["models"]}
print(
    json.dumps(
        {
            "answers": {model: answers for model, (answers, _) in found.items()},
            "facts": {model: facts for model, (_, facts) in found.items()},
            "errors": {"unknown model": refused("hosted_vllm/no-such-model")},
        }
    )
)
