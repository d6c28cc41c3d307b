"""POST /v1/chat/completions, streaming and not."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from vtp.serve.http.asking import Asked, ask
from vtp.serve.http.errors import ApiError
from vtp.serve.http.fields import read_fields
from vtp.serve.http.openai.answers import Writer
from vtp.serve.http.openai.request import ChatRequest, read_chat
from vtp.serve.http.responses import DONE, PING, EventStream, JsonResponse, event
from vtp.serve.http.service import Service


async def chat_completions(request: Request) -> Response:
    """The endpoint. Raises ApiError for whatever shows before an answer has begun."""
    service = Service.of(request)
    service.models.check_ready()
    asked_for = read_chat(await read_fields(request))
    model = service.models.lookup(asked_for.model)
    service.note_unread(asked_for.unread)
    asked = await ask(request, model, asked_for.question)
    asked_for = asked_for.without_pictures()
    if asked_for.stream:
        return await EventStream.begun(_events(asked, asked_for))
    result = await asked.whole()
    return JsonResponse(_writer(asked, asked_for).whole(result, asked.notes))


def _writer(asked: Asked, asked_for: ChatRequest) -> Writer:
    sizes = asked.sizes if asked_for.show_kept else None
    logprobs = "logprobs" in asked_for.question.options
    return Writer(asked.model, asked_for.include_usage, logprobs, sizes, asked.chosen)


async def _events(asked: Asked, asked_for: ChatRequest) -> AsyncIterator[bytes]:
    """Server-sent events: the role with the first text, text, why it ended, usage if wanted, the end."""
    writer, begun = _writer(asked, asked_for), False
    async for piece in asked.pieces():
        if piece is None:
            yield PING
            continue
        role = b"" if begun else event(writer.role())
        begun = True
        yield role + event(writer.content(piece, asked.new_logprobs()))
    if (result := asked.result) is None:
        raise ApiError("the answer has no end", 500)  # pieces() ends with a result, or raises
    last = [] if begun else [writer.role()]
    last.append(writer.finish(result, asked.notes, asked.new_logprobs()))
    if asked_for.include_usage:
        last.append(writer.usage(result))
    yield b"".join(map(event, last)) + DONE
