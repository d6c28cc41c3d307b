"""The door: who is let in is decided here, and what is asked is answered by a replica of the model.

The same endpoints and checks as without replicas; a request goes on to one of them, its answer comes back as
it is made.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from vtp.serve.http.app import health, make_app
from vtp.serve.http.errors import GONE, OLLAMA, ApiError
from vtp.serve.http.fields import fields_of
from vtp.serve.http.metrics import CONTENT_TYPE
from vtp.serve.http.models import Models, unknown_model
from vtp.serve.http.ollama.answers import LATEST
from vtp.serve.http.page import page_route
from vtp.serve.http.refusals import failure
from vtp.serve.http.responses import DONE, EventStream, JsonResponse, LineStream, encoded, event
from vtp.serve.http.service import Service
from vtp.serve.http.waiting import disconnected
from vtp.serve.scale.call import Call
from vtp.serve.scale.cluster import Cluster, Reply
from vtp.serve.scale.replica import CARDS
from vtp.serve.scale.samples import merged, replica_counts
from vtp.serve.settings import Settings

# Lists of all models: each replica's has its own entry, under this key.
_LISTS = {CARDS: "data", "/api/tags": "models", "/api/ps": "models"}
ARRIVAL = 30.0  # seconds for a request to reach a replica: none may run just then


class Remote(Models):
    """Models that replicas hold. `load` starts them; requests that are under way end with `cancel`."""

    def __init__(self, cluster: Cluster, names: Sequence[str], arrival: float = ARRIVAL) -> None:
        """arrival: seconds for a request to reach a replica."""
        super().__init__(names=names)
        self.cluster, self.arrival = cluster, arrival
        self.lists: dict[str, dict[str, Any]] = {}
        self.described: dict[str, dict[str, Any]] = {}
        self._under_way: set[asyncio.Future[None]] = set()
        self._cancelled = False

    def connect(self) -> None:
        """See `Cluster.connect`."""
        self.cluster.connect()

    def load(self, label: str) -> None:
        """Start the replicas; then requests are taken. See `Cluster.start`."""
        self.cluster.start(label, lambda: self.stopping)
        if self.stopping:
            return
        for path, key in _LISTS.items():
            bodies = [json.loads(self.cluster.get(name, path)) for name in self.names]
            self.lists[path] = {**bodies[0], key: [one for body in bodies for one in body[key]]}
        self.described = {name: self.cluster.describe(name) for name in self.names}
        self.loaded()

    def ready_lines(self) -> Iterator[str]:
        """What is said of each model once it is ready."""
        for name, said in self.described.items():
            visual = said["card"]["vtp"]
            yield (
                f"{name}: ready on {visual['engine']}, {self.cluster.replicas} replicas on Ray, "
                f"{said['slots']} at a time each, keeps {visual['default_keep_tokens']} of "
                f"{visual['visual_tokens']} visual tokens"
            )
            if said["in_turn"]:
                yield f"{name}: a replica answers requests one after the other: {said['in_turn']}"

    def cancel(self) -> None:
        """Take no more requests, and end those that there are; returns at once."""
        self.stopping = self._cancelled = True
        for one in tuple(self._under_way):
            with suppress(RuntimeError):  # its loop is closed
                one.get_loop().call_soon_threadsafe(_set, one)

    def close(self, drain: bool = True) -> None:
        """End the replicas."""
        self.stopping = True
        self.cluster.close()

    @contextmanager
    def ending(self) -> Iterator[asyncio.Future[None]]:
        """Within it, a future that is done once the request has to end."""
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._under_way.add(end)
        if self._cancelled:
            _set(end)
        try:
            yield end
        finally:
            self._under_way.discard(end)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def make_front(models: Remote, settings: Settings) -> Starlette:
    """The application that lets requests in and hands them on."""
    routes = [
        page_route(),
        Route("/health", health),
        Route("/v1/health", health),
        Route("/health/ready", ready),
        Route("/metrics", metrics),
        *(Route(path, listed) for path in (*_LISTS, "/models")),
        Route("/{path:path}", Forward(models)),
    ]
    return make_app(models, settings, routes)


def _models(request: Request) -> Remote:
    models = Service.of(request).models
    assert isinstance(models, Remote)
    return models


async def ready(request: Request) -> Response:
    """Whether every model has a replica that takes requests."""
    models = _models(request)
    models.check_ready()
    running = await asyncio.to_thread(models.cluster.running)
    if not all(running.values()):
        raise ApiError("a model has no replica that runs; one is being started", 503)
    return JsonResponse({"status": "ok"})


async def listed(request: Request) -> Response:
    """A list of the models."""
    models = _models(request)
    models.check_ready()
    path = request.url.path
    return JsonResponse(models.lists[path if path in _LISTS else CARDS])


async def metrics(request: Request) -> Response:
    """Those of all replicas."""
    models = _models(request)
    texts = await models.cluster.texts()
    counts = {name: len(found) for name, found in texts.items()}
    told = replica_counts(counts, models.cluster.replicas)
    flat = {replica: text for found in texts.values() for replica, text in found.items()}
    return Response(told + merged(flat), media_type=CONTENT_TYPE)


async def model_of(path: str, body: bytes, names: Sequence[str]) -> str:
    """The model that a request goes to; the first for one that names none, or that cannot be read: its
    replica says what is wrong. ApiError 404 for a model that is not served."""
    if len(names) == 1:
        return names[0]
    name: object = None
    if path.startswith(f"{CARDS}/"):
        name = path.removeprefix(f"{CARDS}/")
    elif body:
        with suppress(ApiError):
            fields = await fields_of(body)
            name = fields.raw("model") or (fields.raw("name") if path.startswith(OLLAMA) else None)
    if not isinstance(name, str) or not name:
        return names[0]
    if path.startswith(OLLAMA) and name not in names and name.removesuffix(LATEST) in names:
        return name.removesuffix(LATEST)
    if name not in names:
        raise unknown_model(name, names)
    return name


class Forward:
    """Hands a request to a replica, as an ASGI application."""

    def __init__(self, models: Remote) -> None:
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError while nothing of an answer has been sent; after that, it is the answer's end."""
        self._models.check_ready()
        request = Request(scope, receive)
        reply = await self._ask(request)
        relay = Relay(send)
        try:
            async with aclosing(self._answer(reply, request)) as answer:
                async for messages in answer:
                    for message in messages:
                        await relay.send(message)
                    if relay.complete:
                        return
        except Exception as error:
            told = error if isinstance(error, ApiError) else failure(error)
            if not relay.can_end:
                raise told from error
            await relay.end(told)
        finally:
            if not relay.complete:
                await reply.cancel()

    async def _ask(self, request: Request) -> Reply:
        try:
            body = b"".join([piece async for piece in request.stream()])
        except ClientDisconnect:
            raise ApiError("the client went away", GONE) from None
        path = request.scope["path"]
        name = await model_of(path, body, self._models.names)
        kind = request.headers.get("content-type", "").encode("latin-1")
        return self._models.cluster.ask(name, Call(request.method, path, kind), body)

    async def _answer(self, reply: Reply, request: Request) -> AsyncGenerator[list[Message], None]:
        """Until it is over. ApiError if the client goes, the server stops, or no replica takes it."""
        gone = asyncio.create_task(disconnected(request))
        patience: float | None = self._models.arrival
        with self._models.ending() as end:
            try:
                while (messages := await _next(reply, gone, end, patience)) is not None:
                    patience = None
                    yield messages
            finally:
                gone.cancel()


async def _next(
    reply: Reply, gone: asyncio.Task[None], end: asyncio.Future[None], patience: float | None
) -> list[Message] | None:
    coming = asyncio.create_task(reply.next())
    try:
        ends: set[asyncio.Future[Any]] = {coming, gone, end}
        await asyncio.wait(ends, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        if coming.done():
            return coming.result()
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
    if gone.done():
        raise ApiError("the client went away", GONE)
    if end.done():
        raise ApiError("the server is stopping, and ended this request; try again later", 503)
    raise ApiError(
        "no replica of the model takes requests now; try again later", 503, headers={"Retry-After": "5"}
    )


class Relay:
    """Sends an answer on, and can end it in its own manner."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._kind = ""  # of a stream that has begun
        self.complete = False  # the whole answer was sent; what is received then says nothing

    @property
    def can_end(self) -> bool:
        """Whether a stream has begun that can say that it failed."""
        return self._kind in (EventStream.media_type, LineStream.media_type)

    async def send(self, message: Message) -> None:
        """Send a message on."""
        if message["type"] != "http.response.start":
            self.complete = not message.get("more_body")
        else:
            self._kind = (
                dict(message["headers"]).get(b"content-type", b"").decode("latin-1").partition(";")[0]
            )
        await self._send(message)

    async def end(self, error: ApiError) -> None:
        """Say what went wrong, and end the stream."""
        if self._kind == EventStream.media_type:
            data = event(error.body()) + DONE
        else:
            data = encoded(error.body_at(OLLAMA)) + b"\n"
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
