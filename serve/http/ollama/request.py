"""Requests of /api/chat and /api/generate, checked: what is served, what is refused, what is ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vtp.engines.errors import quoted_argument
from vtp.serve.http.asking import PictureSource, Question
from vtp.serve.http.errors import ApiError
from vtp.serve.http.fields import Fields
from vtp.serve.http.openai.request import LARGEST, MOST_TEMPERATURE, read_form, read_own, read_stops

ROLES = ("system", "user", "assistant")
_MOST_TURNS = 4096
# Fields that change no answer here; a template never comes from a request.
_IGNORED = ("keep_alive", "template", "context", "truncate", "shift", "options.num_ctx", "verbose")


@dataclass(frozen=True)
class OllamaRequest:
    """What a client asks.

    question  None: nothing, the model is only to be loaded
    unread    names of fields that nothing here knows
    """

    model: Any
    question: Question | None
    stream: bool
    unread: tuple[str, ...]


class _Reader:
    """Collects pictures and unknown fields while turns are read."""

    def __init__(self) -> None:
        self.pictures: list[PictureSource] = []
        self.unread: list[str] = []

    def turn(self, turn: Fields) -> dict[str, Any]:
        """One turn of a chat."""
        role, at = turn.text("role"), turn.param("role")
        if role not in ROLES:
            raise ApiError(f"{at} {quoted_argument(role)} is not served; give {', '.join(ROLES)}", param=at)
        if turn.items("tool_calls"):
            at = turn.param("tool_calls")
            raise ApiError(f"{at} is not served: this server calls no tools; leave it out", param=at)
        content, pictures = turn.text("content") or "", self.images(turn)
        if pictures and role != "user":
            raise ApiError(f"{turn.param('images')}: only user turns may hold pictures", param=at)
        turn.raw("thinking")
        self.unread += turn.unread()
        return {"role": role, "content": content_of(content, pictures)}

    def images(self, body: Fields) -> int:
        """Note the pictures of a turn; returns how many there are."""
        images = body.items("images") or []
        for place, text in enumerate(images):
            at = f"{body.param('images')}.{place}"
            if not isinstance(text, str):
                raise ApiError(f"{at} is not text; give the picture's file in base64", param=at)
            self.pictures.append(
                PictureSource(text if text.startswith("data:") else f"data:;base64,{text}", at)
            )
        return len(images)


def content_of(text: str, pictures: int) -> Any:
    """The content of a turn: its pictures come before the text, as Ollama's templates have it."""
    if not pictures:
        return text
    return [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": text}]


def read_chat(body: Fields) -> OllamaRequest:
    """The body of /api/chat. Raises ApiError 400, with `param`, for the first thing that is wrong."""
    return _read(body, _chat_turns)


def read_generate(body: Fields) -> OllamaRequest:
    """The body of /api/generate, likewise."""
    return _read(body, _generate_turns)


def _read(body: Fields, turns_of: Callable[[Fields, _Reader], list[dict[str, Any]]]) -> OllamaRequest:
    """What both have in common."""
    model, reader = body.raw("model"), _Reader()
    stream = body.flag("stream")
    options = body.fields("options") or Fields({}, "options")
    chosen = {**read_options(options), **read_own(body), **_format(body)}
    _refuse_others(body)
    turns = turns_of(body, reader)
    for name in _IGNORED:
        body.raw(name)
    question = Question(turns, tuple(reader.pictures), chosen) if turns else None
    unread = (*body.unread(), *reader.unread, *map(options.param, options.unread()))
    return OllamaRequest(model, question, stream is not False, unread)


def _chat_turns(body: Fields, reader: _Reader) -> list[dict[str, Any]]:
    messages = body.items("messages") or []
    if len(messages) > _MOST_TURNS:
        raise ApiError(
            f"messages has {len(messages)} turns; at most {_MOST_TURNS} are read", param="messages"
        )
    return [reader.turn(Fields(one, f"messages.{place}")) for place, one in enumerate(messages)]


def _generate_turns(body: Fields, reader: _Reader) -> list[dict[str, Any]]:
    """One question, after the system's words if there are any; without a prompt, nothing is asked."""
    system, prompt = body.text("system"), body.text("prompt")
    for name, what in (("suffix", "text is not filled in"), ("raw", "the bundle's template is always used")):
        if body.raw(name):
            raise ApiError(f"{name} is not served: {what}; leave it out", param=name)
    pictures = reader.images(body)
    if not prompt:
        return []
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": content_of(prompt, pictures)}]


def read_options(options: Fields) -> dict[str, Any]:
    """Ollama's `options` as keyword arguments of `Pipeline.generate`; without a temperature, the likeliest
    token is taken."""
    length = options.whole("num_predict", -LARGEST, LARGEST)
    seed = options.whole("seed", -LARGEST, LARGEST)
    options.raw("num_ctx")  # the cache's length is the bundle's
    chosen = {
        "max_new_tokens": length if (length or 0) > 0 else None,  # below: as many as the cache holds
        "seed": seed if (seed or 0) >= 0 else None,
        "temperature": options.number("temperature", 0, MOST_TEMPERATURE),
        "top_p": options.number("top_p", 1e-6, 1),
        "repetition_penalty": options.number("repeat_penalty", 0.01, 100),
        "stop": read_stops(options) or None,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def _format(body: Fields) -> dict[str, Any]:
    """What the answer must look like: "json", or a JSON schema; as OpenAI's response_format."""
    form = body.raw("format")
    if form is None or form == "":
        return {}
    if form == "json":
        return read_form(Fields({"response_format": {"type": "json_object"}}))
    if not isinstance(form, dict):
        raise ApiError(f'format {quoted_argument(form)} is not "json" or a JSON schema', param="format")
    schema = {"name": "format", "schema": form, "strict": True}
    return read_form(Fields({"response_format": {"type": "json_schema", "json_schema": schema}}))


def _refuse_others(body: Fields) -> None:
    """Refuse what would change the answer and is not served; that it is empty or off is fine."""
    if body.items("tools"):
        raise ApiError("tools are not served: this server calls none; leave them out", param="tools")
    if body.raw("think"):
        raise ApiError("think is not served: leave it out, or give false", param="think")
    if body.raw("logprobs"):
        raise ApiError("logprobs are not served at this address; use /v1/chat/completions", param="logprobs")
