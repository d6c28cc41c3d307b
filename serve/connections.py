"""Connections of the server: how many there may be, and how long a client may keep one without using it."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any, NoReturn

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from vtp.serve.http.errors import ApiError

__all__ = ["Connection", "uvicorn_config"]

_KEEP_ALIVE = 65  # seconds that an idle connection stays
_LARGEST_HEADERS = 32 << 10  # bytes of a request's line and headers together
_MOST = 512
_HEAD = 1 << 16  # bytes of a request's line and headers, if uvicorn was told nothing else
_CHUNKS = 4096  # pieces of a body, beyond which their mean size is looked at
_SMALLEST = 64  # bytes
_NOT_HTTP = "this is not a valid HTTP/1.1 request; this server speaks plain HTTP, no TLS and no HTTP/2"
_CROWDED = "the request's body comes in too many tiny chunks; send it in larger ones"
_OTHER_VERSION = (
    "this server speaks HTTP/1.1, and the request's line names another version; send it as HTTP/1.1"
)
_FILES_LEFT = 2  # connections take at most one of this many files that may be open
_AHEAD = 1 << 16  # bytes that are read of what follows a request while it is answered


def _room() -> int:
    """As many connections as leave files for the rest of the process."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return _MOST
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if files == resource.RLIM_INFINITY else max(8, min(_MOST, files // _FILES_LEFT))


class Connection(H11Protocol):
    """uvicorn's, but clients that connect and do not ask, or ask and do not read, are not waited for.

    head_seconds   within which a request's line and headers must have come, from its first byte
    stall_seconds  within which a client must take what has been written for it (64 KiB of it)
    most           connections; beyond, the one that has been idle longest makes room, else the new one goes
    """

    head_seconds = 20.0
    stall_seconds = 60.0
    most = _room()

    conn: _Reading
    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _since = 0.0

    @property
    def idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """For asyncio."""
        super().connection_made(transport)
        self.conn = _Reading(h11.SERVER, self.config.h11_max_incomplete_event_size or _HEAD)
        self._since = self.loop.time()
        self._await_head()
        if len(self.connections) > self.most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """For asyncio."""
        super().data_received(data)
        if self.idle:
            self._await_head()
        else:
            self._head = _stop(self._head)

    def handle_events(self) -> None:
        """For uvicorn, which stops to read once something follows a request: that the client went away would
        not be noticed then, and its request would go on for nobody."""
        super().handle_events()
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= _AHEAD:
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """For uvicorn, of what is no HTTP: our own words if nothing was answered yet, and the end."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in _refusal(self.conn.refused or ApiError(_NOT_HTTP)):
                self.transport.write(self.conn.send(event))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def on_response_complete(self) -> None:
        """For uvicorn."""
        self._since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """For asyncio: the client does not read as fast as is written."""
        super().pause_writing()
        self._stall = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """For asyncio."""
        super().resume_writing()
        self._stall = _stop(self._stall)

    def timeout_keep_alive_handler(self) -> None:
        """For uvicorn: what was not read until now never will be."""
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """For asyncio."""
        self._head, self._stall = _stop(self._head), _stop(self._stall)
        super().connection_lost(exc)

    def _should_upgrade(self) -> bool:
        """There is nothing to upgrade to, and no need to log that for every client which offers HTTP/2."""
        return False

    def _await_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self._late)

    def _late(self) -> None:
        self._head = None
        if self.idle:
            self.transport.abort()

    def _make_room(self) -> None:
        idle = [one for one in self.connections if isinstance(one, Connection) and one.idle]
        oldest = min(idle, key=lambda one: one._since, default=self)
        self.connections.discard(oldest)
        oldest.transport.abort()


class _Reading(h11.Connection):
    """h11's reader, but two things are not requests: a body in many tiny chunks, each of which takes 20
    microseconds, and another version of HTTP than 1.x, whose next bytes would mean something else.

    refused  what to say of what was not taken; None: it is no HTTP
    """

    refused: ApiError | None = None
    _chunks = 0
    _bytes = 0

    def next_event(self) -> Any:
        """For uvicorn; RemoteProtocolError for what is refused."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
            if not event.http_version.startswith(b"1."):
                self._refuse(ApiError(_OTHER_VERSION, 505))
        elif isinstance(event, h11.Data):
            self._chunks += 1
            self._bytes += len(event.data)
            if self._chunks > _CHUNKS and self._bytes < _SMALLEST * self._chunks:
                self._refuse(ApiError(_CROWDED))
        return event

    def _refuse(self, error: ApiError) -> NoReturn:
        self.refused = error
        raise h11.RemoteProtocolError(error.message)


def _refusal(error: ApiError) -> tuple[h11.Response, h11.Data, h11.EndOfMessage]:
    body = json.dumps(error.body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    reason = HTTPStatus(error.status).phrase.encode()
    start = h11.Response(status_code=error.status, headers=list(headers.items()), reason=reason)
    return start, h11.Data(data=body), h11.EndOfMessage()


def _stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Stop a timer, and have none."""
    if timer is not None:
        timer.cancel()
    return None


def uvicorn_config(app: ASGIApp, *, access_log: bool, closing_seconds: int) -> uvicorn.Config:
    """How every server here listens: plain HTTP/1.1 over `Connection`, our own logs, no proxy's word taken.

    closing_seconds  that connections have left when the server ends
    """
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=access_log,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=closing_seconds,
        h11_max_incomplete_event_size=_LARGEST_HEADERS,
    )
