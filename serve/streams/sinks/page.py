"""A live page: the frame that was asked about last, the answers, and a field for another question.

It listens on this machine alone (127.0.0.1); the checks of host and origin are those of vtp-serve, so that no
other page in the same browser reads it or changes the question. Needs the extra [serve].
"""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from vtp.engines import VtpError
from vtp.serve.connections import uvicorn_config
from vtp.serve.http.admission import guarded
from vtp.serve.http.errors import ApiError
from vtp.serve.http.page import page_route
from vtp.serve.http.responses import PING, error_response, event
from vtp.serve.server import listen
from vtp.serve.streams.answer import FrameAnswer
from vtp.serve.streams.watcher import Watcher

HOST = "127.0.0.1"
_LARGEST_BODY = 64 << 10
_LOOK = 0.05  # seconds between two looks for an answer
_SILENT = 5.0  # seconds after which a comment is sent, so that a lost connection is felt
_STARTING = 10.0


class Page:
    """The page of one watch: a sink for its answers, and a server in a thread of its own."""

    def __init__(self, watcher: Watcher, port: int, source: str) -> None:
        """Listen. Raises UsageError for a port in use."""
        self._watcher, self._source = watcher, source
        # The latest answer, with its number before it and its picture after it.
        self._latest: tuple[int, FrameAnswer, Image.Image] | None = None
        self._over = False
        self._listener = listen(HOST, port)
        self.address = f"http://{HOST}:{self._listener.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn_config(self.app(), access_log=False, closing_seconds=1))
        self._thread = threading.Thread(
            target=self._server.run, args=([self._listener],), name="vtp-page", daemon=True
        )
        self._thread.start()
        end = time.monotonic() + _STARTING
        while not self._server.started and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.01)

    def __call__(self, answer: FrameAnswer) -> None:
        """Show an answer."""
        self._latest = (self._latest[0] + 1 if self._latest else 0, answer, answer.picture())

    def close(self) -> None:
        """End the streams, and the server."""
        self._over = self._server.should_exit = True
        self._thread.join(5.0)
        self._listener.close()

    def app(self) -> ASGIApp:
        """What the server runs."""
        routes = [
            page_route("watch.html", {}),
            Route("/frame.jpg", self._frame),
            Route("/events", self._events),
            Route("/prompt", self._prompt, methods=["POST"]),
        ]
        return guarded(Starlette(routes=routes), limit_bytes=_LARGEST_BODY)

    async def _frame(self, request: Request) -> Response:
        """The frame of the latest answer as JPEG; 404 before there is one."""
        if (latest := self._latest) is None:
            return error_response(ApiError("nothing was asked about yet; wait for the first answer", 404))
        data = await asyncio.to_thread(_jpeg, latest[2])
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    async def _events(self, request: Request) -> Response:
        """Answers as server-sent events; a reader that is slow misses some, as the model misses frames."""
        headers = {"Cache-Control": "no-cache"}
        return StreamingResponse(self._told(), media_type="text/event-stream", headers=headers)

    async def _told(self) -> AsyncIterator[bytes]:
        seen, silent = -1, time.monotonic()
        while not self._over:
            latest = self._latest
            if latest is not None and latest[0] != seen:
                seen, silent = latest[0], time.monotonic()
                yield event({"source": self._source, **latest[1].to_json()})
            elif time.monotonic() - silent > _SILENT:
                silent = time.monotonic()
                yield PING
            await asyncio.sleep(_LOOK)

    async def _prompt(self, request: Request) -> Response:
        """Change the question."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return error_response(ApiError("send the question as application/json", 415))
        try:
            given: Any = json.loads(await request.body())
            text = given["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return error_response(ApiError('send {"prompt": "the question"}'))
        try:
            await asyncio.to_thread(self._ask, text)
        except VtpError as error:
            return error_response(ApiError(str(error)))
        return Response(status_code=204)

    def _ask(self, text: str) -> None:
        self._watcher.prompt = text


def _jpeg(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return out.getvalue()
