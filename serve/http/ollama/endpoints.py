"""Ollama's endpoints: /api/chat and /api/generate, and what clients ask about models."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vtp.engines.errors import quoted_argument
from vtp.serve.http.asking import Asked, ask
from vtp.serve.http.errors import ApiError
from vtp.serve.http.fields import Fields, read_fields
from vtp.serve.http.models import Model
from vtp.serve.http.ollama import answers
from vtp.serve.http.ollama.answers import LATEST, Message, Writer, chat_message, generate_message
from vtp.serve.http.ollama.request import OllamaRequest, read_chat, read_generate
from vtp.serve.http.responses import JsonResponse, LineStream, encoded
from vtp.serve.http.service import Service


async def chat(request: Request) -> Response:
    """POST /api/chat."""
    return await _answer(request, read_chat, chat_message)


async def generate(request: Request) -> Response:
    """POST /api/generate."""
    return await _answer(request, read_generate, generate_message)


async def _answer(request: Request, read: Callable[[Fields], OllamaRequest], message: Message) -> Response:
    """Streamed unless the client says otherwise. Raises ApiError for what shows before an answer begins."""
    service = Service.of(request)
    service.models.check_ready()
    asked_for = read(await read_fields(request))
    model = lookup(service, asked_for.model)
    service.note_unread(asked_for.unread)
    writer = Writer(model, asked_for.model or model.name, message)
    if asked_for.question is None:
        return JsonResponse(writer.loaded())
    asked = await ask(request, model, asked_for.question)
    if asked_for.stream:
        return await LineStream.begun(_lines(asked, writer))
    result = await asked.whole()
    return JsonResponse(writer.end(result, asked.notes, result.raw_text))


async def _lines(asked: Asked, writer: Writer) -> AsyncGenerator[bytes, None]:
    """A JSON object a line; there is no way to say that nothing has come yet."""
    async for piece in asked.pieces():
        if piece is not None:
            yield encoded(writer.piece(piece)) + b"\n"
    assert asked.result is not None  # pieces() ends with a result, or raises
    yield encoded(writer.end(asked.result, asked.notes)) + b"\n"


def lookup(service: Service, name: object) -> Model:
    """The model of a name, with ":latest" or without. ApiError 404 for others."""
    known = {model.name for model in service.models}
    if isinstance(name, str) and name not in known and name.removesuffix(LATEST) in known:
        name = name.removesuffix(LATEST)
    return service.models.lookup(name)


async def tags(request: Request) -> Response:
    """GET /api/tags: the models."""
    models = Service.of(request).models
    models.check_ready()
    return JsonResponse({"models": [answers.tag(model) for model in models]})


async def running(request: Request) -> Response:
    """GET /api/ps: those in memory, which are all."""
    models = Service.of(request).models
    models.check_ready()
    return JsonResponse({"models": [answers.running(model) for model in models]})


async def show(request: Request) -> Response:
    """POST /api/show: one model."""
    return JsonResponse(answers.card(await _named(request)))


async def pull(request: Request) -> Response:
    """POST /api/pull: what is served is there already; nothing is fetched."""
    await _named(request)
    return Response(encoded({"status": "success"}) + b"\n", media_type=LineStream.media_type)


async def version(request: Request) -> Response:
    """GET /api/version."""
    return JsonResponse({"version": answers.API_VERSION})


async def alive(request: Request) -> Response:
    """HEAD /: whether a server is there."""
    return Response()


async def _named(request: Request) -> Model:
    """The model that a request's body names, by either of the names that the field has had."""
    body = await read_fields(request)
    name = body.raw("model") or body.raw("name")
    if not isinstance(name, str):
        raise ApiError(f"model {quoted_argument(name)} is not a model's name", param="model")
    return lookup(Service.of(request), name)


ROUTES = [
    Route("/", alive, methods=["HEAD"]),
    Route("/api/chat", chat, methods=["POST"]),
    Route("/api/generate", generate, methods=["POST"]),
    Route("/api/tags", tags),
    Route("/api/ps", running),
    Route("/api/show", show, methods=["POST"]),
    Route("/api/pull", pull, methods=["POST"]),
    Route("/api/version", version),
]
