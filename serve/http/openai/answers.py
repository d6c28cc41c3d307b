"""An answer as OpenAI's clients read it, with llama-server's timings and what pruning did."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from vtp.runtime.result import Result, TokenLogprob
from vtp.serve.http.models import Model
from vtp.serve.http.pictures.kept_places import kept_places
from vtp.serve.slo import Chosen

_FINISH = {"eos": "stop", "stop": "stop", "length": "length", "timeout": "length"}


def finish_reason(result: Result) -> str:
    """Why an answer ended, as OpenAI says it: "stop" or "length"."""
    return _FINISH[result.finish_reason]


def usage(result: Result) -> dict[str, Any]:
    """Tokens of the prompt, visual ones as they were kept, and of the answer."""
    prompt, completion = prompt_tokens(result), len(result.token_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": result.timings.reused_tokens},
    }


def prompt_tokens(result: Result) -> int:
    """Text tokens and kept visual tokens."""
    return result.prompt_tokens + result.visual_tokens.after


def timings(result: Result) -> dict[str, Any]:
    """llama-server's object of that name; milliseconds, and tokens per second. The queue is not in it."""
    spent, cached = result.timings, result.timings.reused_tokens
    first = spent.ttft or spent.total
    prompt_ms = max(first - spent.stages.get("queue", 0.0), 0.0)
    return {
        "cache_n": cached,
        **_rate("prompt", prompt_tokens(result) - cached, prompt_ms),
        **_rate("predicted", len(result.token_ids), spent.total - first),
    }


def _rate(name: str, count: int, ms: float) -> dict[str, Any]:
    return {
        f"{name}_n": count,
        f"{name}_ms": round(ms, 3),
        f"{name}_per_token_ms": round(ms / count, 3) if count else 0.0,
        f"{name}_per_second": round(1e3 * count / ms, 3) if ms > 0 else 0.0,
    }


def pruning(model: Model, result: Result, notes: list[str]) -> dict[str, Any]:
    """What is said of pruning, of the stages' milliseconds, and of what was done to the request."""
    before, after = result.visual_tokens
    then = result.then
    return {
        "visual_tokens": {"before": before, "after": after},
        "keep_tokens": len(_first(result.kept)),
        "method": model.manifest.method.name,
        "tower": result.tower,
        **({} if then is None else {"then": {name: then[name] for name in ("name", "layer", "tokens")}}),
        "stages": {name: round(ms, 3) for name, ms in result.timings.stages.items()},
        "notes": notes,
    }


def _token(token: TokenLogprob) -> dict[str, Any]:
    """OpenAI's entry of a token, with the most likely ones at its place."""
    return {**_one(token), "top_logprobs": [_one(other) for other in token.top]}


def _one(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.bytes)}


def _first(kept: list[Any]) -> list[Any]:
    """The kept tokens of the first picture."""
    return kept[0] if kept and isinstance(kept[0], list) else kept


class Writer:
    """Writes one answer: whole, or as the chunks of a stream.

    logprobs  whether each token's probability is told
    sizes   of the pictures, if the answer shall say where their kept tokens lie (see `kept_places`)
    chosen  the keep-count that the server chose to be in time, if it did
    """

    def __init__(
        self,
        model: Model,
        include_usage: bool = False,
        logprobs: bool = False,
        sizes: list[tuple[int, int]] | None = None,
        chosen: Chosen | None = None,
    ) -> None:
        self._model = model
        self._logprobs = logprobs
        self._sizes = sizes
        self._chosen = chosen
        self._usage = {"usage": None} if include_usage else {}
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
        }

    def whole(self, result: Result, notes: list[str]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": result.raw_text},
            "logprobs": self._told(result.logprobs or []),
            "finish_reason": finish_reason(result),
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(result),
            **self._figures(result, notes),
        }

    def role(self) -> dict[str, Any]:
        """The first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def content(self, piece: str, tokens: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
        """A chunk of text, and of its tokens."""
        return self._chunk({"content": piece}, tokens=tokens)

    def finish(self, result: Result, notes: list[str], tokens: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
        """The chunk that says why it ended; `tokens` are those that no chunk of text had."""
        return {**self._chunk({}, finish_reason(result), tokens), **self._figures(result, notes)}

    def usage(self, result: Result) -> dict[str, Any]:
        """The chunk after that, for clients that ask for it."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(result)}

    def _chunk(
        self, delta: dict[str, Any], reason: str | None = None, tokens: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        told = self._told(tokens) if tokens else None
        choice = {"index": 0, "delta": delta, "logprobs": told, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **self._usage}

    def _told(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": [_token(one) for one in tokens], "refusal": None} if self._logprobs else None

    def _figures(self, result: Result, notes: list[str]) -> dict[str, Any]:
        own = pruning(self._model, result, notes)
        if self._chosen is not None:
            own["slo"] = self._chosen.to_json()
        if self._sizes is not None:
            own["kept"] = kept_places(self._model.manifest, self._sizes, result.kept)
        return {"timings": timings(result), "vtp": own}
