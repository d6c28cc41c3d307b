"""llama-index-llms-openai-like: chat and stream_chat about an ImageBlock."""

from __future__ import annotations

import json
import os

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike

TASK = json.loads(os.environ["VTP_TASK"])
TURNS = [ChatMessage(role="user", blocks=[ImageBlock(path=TASK["picture"]), TextBlock(text=TASK["prompt"])])]


def of_model(model: str) -> dict[str, str]:
    llm = OpenAILike(
        model=model,
        api_base=TASK["url"] + "/v1",
        api_key="EMPTY",
        is_chat_model=True,
        max_tokens=TASK["max_tokens"],
        temperature=0.0,
        max_retries=0,
    )
    return {
        "chat": llm.chat(TURNS).message.content,
        "stream_chat": "".join(part.delta or "" for part in llm.stream_chat(TURNS)),
    }


print(json.dumps({"answers": {model: of_model(model) for model in TASK["models"]}}))
