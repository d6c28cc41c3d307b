"""The server as an ASGI application, for uvicorn, for Ray and for tests."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vtp.engines.errors import shown
from vtp.serve.http.admission import guarded
from vtp.serve.http.asking import is_counted
from vtp.serve.http.decisions.endpoint import decisions
from vtp.serve.http.errors import GONE, ApiError, let_go
from vtp.serve.http.metrics import CONTENT_TYPE, Metrics
from vtp.serve.http.models import Models
from vtp.serve.http.ollama import endpoints as ollama
from vtp.serve.http.openai.chat import chat_completions
from vtp.serve.http.page import page_route
from vtp.serve.http.refusals import failure
from vtp.serve.http.responses import JsonResponse, error_response
from vtp.serve.http.service import Service, log
from vtp.serve.settings import Settings

_REFUSED = 400  # the least status of a refusal


def make_app(
    models: Models, settings: Settings | None = None, routes: Sequence[BaseRoute] | None = None
) -> Starlette:
    """The application that serves `models`; it closes none of them.

    routes  instead of the endpoints that answer here, behind the same checks
    """
    settings = settings or Settings()
    app = Starlette(
        routes=_routes() if routes is None else routes,
        middleware=_middleware(settings),
        exception_handlers={ApiError: _answer_error, HTTPException: _answer_error},
    )
    app.router.redirect_slashes = False  # `PlainPaths` does it, without a redirect
    app.state.service = Service(models, settings, Metrics())
    return app


def _routes() -> list[BaseRoute]:
    return [
        page_route(),
        Route("/health", health),
        Route("/v1/health", health),
        Route("/health/ready", ready),
        Route("/v1/models", list_models),
        Route("/models", list_models),
        Route("/v1/models/{name:path}", show_model),
        Route("/metrics", metrics),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/decisions", decisions, methods=["POST"]),
        Route("/decisions", decisions, methods=["POST"]),
        *ollama.ROUTES,
    ]


def _middleware(settings: Settings) -> list[Middleware]:
    """From the outside to the inside."""
    checks = Middleware(
        guarded,
        allowed_hosts=settings.allowed_hosts,
        key=settings.key,
        cors_origins=settings.cors_origins,
        limit_bytes=settings.body_bytes,
    )
    return [Middleware(PlainPaths), Middleware(Counted), Middleware(ErrorAnswers), checks]


class PlainPaths:
    """Takes the slash from a path's end: a redirect would name http:, also behind a proxy with TLS."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] == "http" and scope["path"].endswith("/"):
            scope["path"] = scope["path"].rstrip("/") or "/"
        await self._app(scope, receive, send)


class Counted:
    """Counts what is refused before a model is asked: by status, as the model "other"."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; probes of its health are not requests."""

        async def note(message: Message) -> None:
            if message.get("status", 0) >= _REFUSED and _is_uncounted(scope):
                scope["app"].state.service.metrics.refused(message["status"])
            await send(message)

        await self._app(scope, receive, note)


def _is_uncounted(scope: Scope) -> bool:
    return not is_counted(scope) and "health" not in scope["path"].split("/")


class ErrorAnswers:
    """Answers whatever is raised within: an `ApiError` as it says, anything else with status 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; an error once the answer began can only end it."""
        begun = False

        async def note(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception as error:
            told = error if isinstance(error, ApiError) else failure(error)
            let_go(error)
            if begun or scope["type"] != "http":
                raise
            await error_response(told, scope["path"])(scope, receive, send)


async def _answer_error(request: Request, error: Exception) -> Response:
    let_go(error)
    if isinstance(error, HTTPException):
        return error_response(_of_routing(request, error), request.url.path)
    assert isinstance(error, ApiError)
    if error.status == GONE:
        log.info("%s: the client went away", request.url.path)
    return error_response(error, request.url.path)


def _of_routing(request: Request, error: HTTPException) -> ApiError:
    texts = {
        404: "there is nothing at this address; OpenAI's base_url ends in v1",
        405: f"{shown(request.method, 40)} is not allowed at this address",
    }
    return ApiError(
        texts.get(error.status_code, "the request is not valid"), error.status_code, headers=error.headers
    )


async def health(request: Request) -> Response:
    """Whether the server lives: 503 only while it loads."""
    state = Service.of(request).models.state
    return JsonResponse({"status": "ok" if state == "ready" else state}, 503 if state == "loading" else 200)


async def ready(request: Request) -> Response:
    """Whether requests are taken now."""
    models = Service.of(request).models
    models.check_ready()
    return JsonResponse({"status": "ok"})


async def list_models(request: Request) -> Response:
    """What is served."""
    models = Service.of(request).models
    models.check_ready()
    return JsonResponse({"object": "list", "data": [model.card() for model in models]})


async def show_model(request: Request) -> Response:
    """One of the models."""
    return JsonResponse(Service.of(request).models.lookup(request.path_params["name"]).card())


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    service = Service.of(request)
    text = service.metrics.text(service.models.schedulers)
    shadows = [line for model in service.models if model.shadow for line in model.shadow.lines(model.name)]
    return Response("\n".join([text.rstrip("\n"), *shadows, ""]), media_type=CONTENT_TYPE)
