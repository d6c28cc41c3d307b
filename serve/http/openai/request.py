"""A chat completion request, checked by hand: what is served, what is refused, what is ignored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vtp.engines.errors import nearest, quoted_argument
from vtp.serve.http.asking import Question
from vtp.serve.http.errors import ApiError
from vtp.serve.http.fields import Fields
from vtp.serve.http.openai.messages import Reader, highest

LARGEST = 2**63 - 1  # of a seed or a number of tokens
MOST_TEMPERATURE = 2.0
MOST_LOGPROBS = 20
_STOPS = 16
_STOPS_LENGTH = 4096  # characters of all

# Fields that change no answer here, or that no answer may depend on: templates never come from requests.
_IGNORED = (
    "chat_template",
    "chat_template_kwargs",
    "metadata",
    "parallel_tool_calls",
    "service_tier",
    "store",
    "user",
)
_OWN = ("keep_tokens", "budget_ms", "show_kept")


@dataclass(frozen=True)
class ChatRequest:
    """What a client asks.

    model   as it was given, checked when it is looked up
    show_kept  whether the answer says which visual tokens were kept
    unread  names of fields that nothing here knows
    """

    model: Any
    question: Question
    stream: bool
    include_usage: bool
    show_kept: bool
    unread: tuple[str, ...]

    def without_pictures(self) -> ChatRequest:
        """The same without the texts of its pictures, which are large and have been read."""
        return replace(self, question=replace(self.question, pictures=()))


def read_chat(body: Fields) -> ChatRequest:
    """Check a request's body. Raises ApiError 400, with `param`, for the first thing that is wrong."""
    model = body.raw("model")
    stream = body.flag("stream") or False
    options = {**_limits(body), **_sampling(body), **read_own(body), **read_form(body)}
    include_usage = _include_usage(body)
    _refuse_others(body)
    reader = Reader()
    turns = reader.turns(body.raw("messages"))
    for name in _IGNORED:
        body.raw(name)
    question = Question(turns, tuple(reader.pictures), options, highest(reader.details))
    unread = (*body.unread(), *reader.unread)
    return ChatRequest(model, question, stream, include_usage, _show_kept(body), unread)


def _limits(body: Fields) -> dict[str, Any]:
    """How long the answer may be."""
    older, newer = (body.whole(name, 1, LARGEST) for name in ("max_tokens", "max_completion_tokens"))
    most = older if newer is None else newer
    chosen: dict[str, Any] = {} if most is None else {"max_new_tokens": most}
    if stops := read_stops(body):
        chosen["stop"] = stops
    return chosen


def read_stops(body: Fields) -> list[str]:
    """Texts at which an answer ends."""
    stop = body.raw("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise ApiError(
            f"stop {quoted_argument(stop)} is not text, or a list of texts, of at least one character",
            param="stop",
        )
    if len(stops) > _STOPS:
        raise ApiError(f"stop has {len(stops)} texts; give at most {_STOPS}", param="stop")
    if (length := sum(map(len, stops))) > _STOPS_LENGTH:
        raise ApiError(f"stop has {length} characters together; give at most {_STOPS_LENGTH}", param="stop")
    return stops


def _sampling(body: Fields) -> dict[str, Any]:
    chosen = {
        "temperature": body.number("temperature", 0, MOST_TEMPERATURE),
        "top_p": body.number("top_p", 0, 1),
        "seed": body.whole("seed", -1, LARGEST),
        "repetition_penalty": body.number("repetition_penalty", 0.01, 100),
    }
    if chosen["top_p"] == 0:
        raise ApiError(
            "top_p 0 leaves no token to choose; give more, up to 1, or temperature 0", param="top_p"
        )
    if chosen["seed"] == -1:  # what other servers take for "none"
        chosen["seed"] = None
    return {name: value for name, value in chosen.items() if value is not None}


def read_own(body: Fields) -> dict[str, Any]:
    """The object `vtp`, of which no field may be misspelt: it says how much is pruned."""
    own = body.fields("vtp")
    if own is None:
        return {}
    chosen = {
        "keep_tokens": own.whole("keep_tokens", 1, LARGEST),
        "budget_ms": own.number("budget_ms", 0, 1e9),
    }
    own.flag("show_kept")
    if name := next(own.unread(), None):
        hint = nearest(name, list(_OWN))
        raise ApiError(
            f"vtp has the unknown field {quoted_argument(name)}; it takes {', '.join(_OWN)}{hint}",
            param="vtp",
        )
    if None not in chosen.values():
        raise ApiError("give either vtp.keep_tokens or vtp.budget_ms, not both", param="vtp")
    return {name: value for name, value in chosen.items() if value is not None}


def _show_kept(body: Fields) -> bool:
    own = body.fields("vtp")
    return bool(own and own.flag("show_kept"))


def read_form(body: Fields) -> dict[str, Any]:
    """What the answer must look like, and what is to be told of its tokens."""
    return {**_logprobs(body), **_response_format(body)}


def _logprobs(body: Fields) -> dict[str, Any]:
    wanted, count = body.flag("logprobs"), body.whole("top_logprobs", 0, MOST_LOGPROBS)
    if count and not wanted:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    if wanted:
        return {"logprobs": count or 0}
    return {}


def _response_format(body: Fields) -> dict[str, Any]:
    form = body.fields("response_format")
    kind = form.choice("type", ("text", "json_object", "json_schema")) if form else "text"
    if kind is None:
        raise ApiError(
            "response_format.type is missing; give text, json_object or json_schema",
            param="response_format.type",
        )
    return {} if kind == "text" else {"response_format": body.raw("response_format")}


def _include_usage(body: Fields) -> bool:
    options = body.fields("stream_options")
    return bool(options and options.flag("include_usage"))


def _refuse_others(body: Fields) -> None:
    """Refuse what would change the answer and is not served; that it is empty or off is fine."""
    if body.whole("n", 1, LARGEST) not in (None, 1):
        raise ApiError("n must be 1: this server gives one answer to a request", param="n")
    for name in ("tools", "functions"):
        if body.items(name):
            raise ApiError(f"{name} are not served: this server calls none; leave them out", param=name)
    for name in ("tool_choice", "function_call"):
        if body.raw(name) not in (None, "none", "auto"):
            raise ApiError(f"{name} is not served: this server calls no tools; leave it out", param=name)
    for name in _modalities(body):
        if name != "text":
            raise ApiError(f"modalities {quoted_argument(name)} is not served; give text", param="modalities")


def _modalities(body: Fields) -> Iterator[Any]:
    yield from body.items("modalities") or ()
