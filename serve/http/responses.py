"""Answers on the wire: JSON that always can be encoded, and streams of server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vtp.serve.http.errors import OLLAMA, ApiError, let_go
from vtp.serve.http.refusals import failure

PING = b": ping\n\n"  # a comment, which clients skip
DONE = b"data: [DONE]\n\n"


def encoded(data: Any) -> bytes:
    """JSON in UTF-8; half a character, which UTF-8 lacks, as its escape."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def event(data: Any) -> bytes:
    """One event."""
    return b"data: " + encoded(data) + b"\n\n"


class JsonResponse(Response):
    """A JSON body."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode the body."""
        return encoded(content)


def error_response(error: ApiError, path: str = "") -> Response:
    """An error as a whole answer, at the path of a request."""
    return JsonResponse(error.body_at(path), error.status, error.headers)


class EventStream(Response):
    """Events as they come. What goes wrong once it began is an event with `error`, and the end."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        """See `begun`."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._events = first, events

    @classmethod
    async def begun(cls, events: AsyncIterator[bytes]) -> EventStream:
        """A stream whose first event is there: an error before that has a status of its own."""
        assert isinstance(events, AsyncGenerator)
        return cls(await anext(events), events)

    def failed(self, error: ApiError) -> bytes:
        """What ends a stream that fails."""
        return event(error.body()) + DONE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; however it ends, the events end too."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _send(send, self._first)
            try:
                async for data in self._events:
                    await _send(send, data)
            except Exception as error:
                told = error if isinstance(error, ApiError) else failure(error)
                let_go(error)
                await _send(send, self.failed(told))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()


class LineStream(EventStream):
    """The same as lines of JSON, as Ollama's clients read them."""

    media_type = "application/x-ndjson"

    def failed(self, error: ApiError) -> bytes:
        """A line with `error`, and no `done`."""
        return encoded(error.body_at(OLLAMA)) + b"\n"


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
