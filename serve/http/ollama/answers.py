"""An answer, and what is known of a model, as Ollama's clients read it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from typing import Any

from vtp.runtime.bundle.fewer_bits import bits_of
from vtp.runtime.result import Result
from vtp.serve.http.models import Model
from vtp.serve.http.openai.answers import finish_reason, prompt_tokens, pruning, timings

#: The version of Ollama whose API this is: clients look for it, and for `capabilities` of /api/show.
API_VERSION = "0.6.4"
LATEST = ":latest"
_NS = 1e6  # in a millisecond
_STAYS = timedelta(days=3650)  # models are never unloaded
_LEVELS = {"float32": "F32", "float16": "F16", "int8": "Q8", "int4": "Q4"}

Message = Callable[[str], dict[str, Any]]


def chat_message(text: str) -> dict[str, Any]:
    """Where /api/chat has the text."""
    return {"message": {"role": "assistant", "content": text}}


def generate_message(text: str) -> dict[str, Any]:
    """Where /api/generate has it."""
    return {"response": text}


class Writer:
    """Writes one answer: whole, or as the lines of a stream. `name` is the model's, as it was asked for."""

    def __init__(self, model: Model, name: str, message: Message) -> None:
        self._model, self._name, self._message = model, name, message

    def piece(self, text: str) -> dict[str, Any]:
        """A line with some text."""
        return {**self._head(), **self._message(text), "done": False}

    def end(self, result: Result, notes: list[str], text: str = "") -> dict[str, Any]:
        """The last line, or the whole answer: how it ended, and times in nanoseconds."""
        spent = timings(result)
        prompt, predicted = (round(spent[name] * _NS) for name in ("prompt_ms", "predicted_ms"))
        return {
            **self._head(),
            **self._message(text),
            "done": True,
            "done_reason": finish_reason(result),
            "total_duration": round(result.timings.total * _NS),
            "load_duration": 0,
            "prompt_eval_count": prompt_tokens(result),
            "prompt_eval_duration": prompt,
            "eval_count": len(result.token_ids),
            "eval_duration": predicted,
            "vtp": pruning(self._model, result, notes),
        }

    def loaded(self) -> dict[str, Any]:
        """The answer to a request that asks nothing."""
        return {**self._head(), **self._message(""), "done": True, "done_reason": "load"}

    def _head(self) -> dict[str, Any]:
        return {"model": self._name, "created_at": _time(datetime.now(timezone.utc))}


def tag(model: Model) -> dict[str, Any]:
    """A model's entry in /api/tags."""
    name = model.name if ":" in model.name else model.name + LATEST
    return {
        "name": name,
        "model": name,
        "modified_at": _modified(model),
        "size": sum(file.bytes for file in model.manifest.files.values()),
        "digest": _digest(model),
        "details": details(model),
    }


def running(model: Model) -> dict[str, Any]:
    """A model's entry in /api/ps."""
    entry = tag(model)
    del entry["modified_at"]
    until = datetime.now(timezone.utc) + _STAYS
    context = model.max_tokens
    return {**entry, "expires_at": _time(until), "size_vram": 0, "context_length": context}


def card(model: Model) -> dict[str, Any]:
    """The body of /api/show: what the model can do, and its size."""
    manifest = model.manifest
    family = manifest.model.family
    return {
        "license": "",
        "modelfile": "",
        "parameters": "",
        "template": "{{ .Prompt }}",
        "details": details(model),
        "model_info": {
            "general.architecture": family,
            "general.name": manifest.model.name,
            f"{family}.context_length": model.max_tokens,
            f"{family}.embedding_length": manifest.model.hidden_size,
            f"{family}.vocab_size": manifest.model.vocab_size,
            "vtp.method": manifest.method.name,
            "vtp.visual_tokens": manifest.visual.count,
            "vtp.keep_tokens": sorted(manifest.visual.keep),
        },
        "capabilities": ["completion", "vision"],
        "modified_at": _modified(model),
    }


def details(model: Model) -> dict[str, Any]:
    """A model's kind, as lists of models show it."""
    manifest = model.manifest
    bits = bits_of(manifest.quantization).get("decoder", manifest.dtype)
    return {
        "parent_model": "",
        "format": "onnx",
        "family": manifest.model.family,
        "families": [manifest.model.family],
        "parameter_size": "",
        "quantization_level": _LEVELS.get(bits) or _LEVELS.get(manifest.dtype, manifest.dtype),
    }


def _digest(model: Model) -> str:
    """One hash for all files of the bundle."""
    files = sorted(model.manifest.files.items())
    return sha256("".join(f"{name}\0{file.sha256}\n" for name, file in files).encode()).hexdigest()


def _modified(model: Model) -> str:
    return _time(datetime.fromtimestamp(model.created, timezone.utc))


def _time(moment: datetime) -> str:
    """As Go writes it."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
