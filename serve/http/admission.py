"""Who is let in: the checks that every request passes before the application sees it, as ASGI middlewares.

`guarded` puts them around an application in the right order: host, cross-origin headers, origin, key, size.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import re
import socket
import time
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vtp.serve.http.errors import ApiError

__all__ = ["BodyLimit", "HostCheck", "KeyCheck", "OriginCheck", "guarded"]

_OPEN_PATHS = frozenset(("/", "/metrics", "/health"))  # without a key, and what lies below /health
_HOST = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[^\[\]:/@\s]+)(?::[0-9]{0,5})?")
_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9._~%!$&'()*+,;=-]+)(:[0-9]{0,5})?"
)
_PORTS = {"http": ":80", "https": ":443"}  # that an origin leaves out
# Schemes of the web (WHATWG's special ones, and those of a page's own content), of which http and https alone
# have an origin. Any other scheme is an application's or an extension's.
_OF_PAGES = frozenset(
    ("about", "blob", "data", "file", "filesystem", "ftp", "http", "https", "javascript", "ws", "wss")
)
_SLOWEST = 1024  # bytes a second that a body must bring on the whole
_DRAIN_SECONDS = 5.0  # for a client that sends on after it was refused, so that it reads why


def guarded(
    app: ASGIApp,
    *,
    allowed_hosts: Sequence[str] = (),
    key: str | None = None,
    cors_origins: Sequence[str] = (),
    limit_bytes: int = 64 * 2**20,
) -> ASGIApp:
    """An application behind all checks.

    allowed_hosts  further names that the Host header may have: "vtp.example.org", "*.example.org", "*"
    key            that clients must send as `Authorization: Bearer`; None: none
    cors_origins   origins whose pages may use the server: "https://example.org", "*"
    limit_bytes    of one request's body; those of all requests together may hold four times as much
    """
    app = BodyLimit(app, limit_bytes)
    if key is not None:
        app = KeyCheck(app, key)
    app = OriginCheck(app, cors_origins)
    if cors_origins:  # around the key: preflights have none, and a page must be able to read a refusal
        app = _Preflights(
            app,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
            allow_private_network=True,
            max_age=600,
        )
    return HostCheck(app, allowed_hosts)


class _Preflights(CORSMiddleware):
    """Starlette's, but a preflight is refused (403) in the words of all other refusals."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to OPTIONS with an Origin."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        error = ApiError(
            "this server is not for pages of the origin in the Origin header, or not with this method: it "
            "takes GET and POST; have its owner allow the origin (vtp-serve --cors-origin)",
            403,
        )
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return Response(json.dumps(error.body()), error.status, kept, "application/json")


class HostCheck:
    """Refuses names that are not the server's own, so that no web page reaches it by a name of its own that
    leads here (DNS rebinding).

    Addresses pass, since no resolver stands between them and the server; so do localhost, the machine's name,
    names below .localhost and .local, and `allowed_hosts`. 403 for others, 400 without one Host header, and
    for a body whose length is given in two ways.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str] = ()) -> None:
        self._app = app
        own = socket.gethostname().lower()
        self._names = {"localhost", own, own.partition(".")[0], *(name.lower() for name in allowed_hosts)}
        self._below = (".localhost", ".local", *(name[1:] for name in self._names if name.startswith("*.")))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = None if scope["type"] == "lifespan" else self._refusal(scope)
        await (self._app(scope, receive, send) if error is None else _refuse(scope, send, error))

    def _refusal(self, scope: Scope) -> ApiError | None:
        if _headers(scope, b"content-length") and _headers(scope, b"transfer-encoding"):
            return ApiError(
                "the request has both Content-Length and Transfer-Encoding, so that proxies may read it "
                "in another way; send one of them",
                headers={"connection": "close"},
            )
        headers = _headers(scope, b"host")
        found = _HOST.fullmatch(headers[0].decode("latin-1").lower()) if len(headers) == 1 else None
        if found is None:
            return ApiError("the request must have one Host header with a name or an address")
        if self._is_known(found["host"].removesuffix(".")):
            return None
        return ApiError(
            "this server is not known by the name in the Host header; use its address, or have its owner "
            "allow the name (vtp-serve --allow-host)",
            403,
        )

    def _is_known(self, host: str) -> bool:
        return "*" in self._names or host in self._names or host.endswith(self._below) or _is_address(host)


def _is_address(host: str) -> bool:
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


class OriginCheck:
    """Refuses (403) what a foreign web page sends: it could not read the answer, but the work would be done.

    Without the header Origin, no browser is behind the request. The server's own page passes, and so do
    `origins` and those of applications and extensions (such as app://), which no web page has. What is not
    an origin as browsers write it (RFC 6454: scheme://host, with a port or without) is refused, but for the
    case of its letters.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str] = ()) -> None:
        self._app = app
        self._any = "*" in origins
        self._origins = frozenset(map(_normal, origins))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._passes(scope):
            await self._app(scope, receive, send)
            return
        await _refuse(
            scope,
            send,
            ApiError(
                "this server is not for pages of the origin in the Origin header; have its owner allow it "
                "(vtp-serve --cors-origin)",
                403,
            ),
        )

    def _passes(self, scope: Scope) -> bool:
        if scope["method"] in ("GET", "HEAD", "OPTIONS") or self._any:
            return True
        host = b"".join(_headers(scope, b"host")).decode("latin-1")
        given = (origin.decode("latin-1") for origin in _headers(scope, b"origin"))
        return all(self._may(_normal(origin), host) for origin in given)

    def _may(self, origin: str | None, host: str) -> bool:
        if origin is None or origin in self._origins:
            return origin is not None
        scheme = origin.partition("://")[0]
        own = _normal(f"{scheme}://{host}") if scheme in _PORTS else None
        return origin == own or not (origin == "null" or scheme in _OF_PAGES)


def _normal(origin: str) -> str | None:
    """An origin as browsers write it: in small letters, without its scheme's own port; None: it is none."""
    origin = origin.lower()
    if origin == "null":
        return origin
    found = _ORIGIN.fullmatch(origin)
    return origin.removesuffix(":").removesuffix(_PORTS.get(found["scheme"], "")) if found else None


class KeyCheck:
    """Asks for `Authorization: Bearer KEY`; the page, health and metrics are open. 401 otherwise."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._digest = _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": "Bearer"}
        await _refuse(
            scope,
            send,
            ApiError(
                "this server wants its API key: send the header Authorization: Bearer KEY with the right key",
                401,
                code="invalid_api_key",
                headers=headers,
            ),
        )

    def _has_key(self, scope: Scope) -> bool:
        """Digests are of one length, so that the time tells nothing, not even how long the key is."""
        headers = _headers(scope, b"authorization")
        scheme, _, given = headers[0].partition(b" ") if len(headers) == 1 else (b"", b"", b"")
        same = hmac.compare_digest(_digest(given.strip()), self._digest)
        return same and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_open(scope: Scope) -> bool:
    path = scope.get("path", "")
    return scope["type"] == "http" and (path in _OPEN_PATHS or path.startswith("/health/"))


class BodyLimit:
    """Refuses (413) bodies of more than `limit_bytes`, by Content-Length or, where they come in chunks, as
    soon as there are more; the client gets the answer although it still sends.

    Bodies of all requests together hold at most `total_bytes` until their answers end (503 beyond), and a
    client that sends nothing for `idle_seconds`, or after them less than a byte now and then, is not waited
    for (408).
    """

    def __init__(
        self, app: ASGIApp, limit_bytes: int, total_bytes: int | None = None, idle_seconds: float = 30.0
    ) -> None:
        self._app = app
        self.limit = limit_bytes
        self.total = 4 * limit_bytes if total_bytes is None else total_bytes
        self.idle = idle_seconds
        self.held = 0  # bytes, of all requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(self, scope, receive, send)
        if _declared(scope) > self.limit:
            await body.refuse(body.too_large())
            return
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if not body.refused:
                raise
        finally:
            body.release()


class _Body:
    """One request's body while the application reads it. Once it was refused, the application is told that
    the client has gone, and what it says then reaches nobody."""

    def __init__(self, owner: BodyLimit, scope: Scope, receive: Receive, send: Send) -> None:
        self._owner, self._scope, self._receive, self._send = owner, scope, receive, send
        self._more = True
        self._started = False
        self._left, self._then = owner.idle, time.monotonic()  # seconds to wait for more, counted from then
        self.size = 0
        self.refused = False

    async def receive(self) -> Message:
        """For the application."""
        if self.refused:
            return {"type": "http.disconnect"}
        try:
            message = await asyncio.wait_for(self._receive(), self._left if self._more else None)
        except asyncio.TimeoutError:
            return await self.refuse(self._late())
        self._more = bool(message.get("more_body"))
        return await self._taken(message)

    async def send(self, message: Message) -> None:
        """For the application."""
        if not self.refused:
            self._started = True
            await self._send(message)

    def _wait_longer(self, count: int) -> None:
        """Bytes have come. A body that comes too slowly uses its time up, however much of it came at once."""
        now = time.monotonic()
        self._left = min(self._owner.idle, self._left - (now - self._then) + count / _SLOWEST)
        self._then = now

    async def _taken(self, message: Message) -> Message:
        """A message that was counted, if there is room for it."""
        count = len(message.get("body", b""))
        self._wait_longer(count)
        self.size += count
        self._owner.held += count
        if self.size > self._owner.limit:
            return await self.refuse(self.too_large())
        if self._owner.held > self._owner.total:
            return await self.refuse(self._crowded())
        return message

    def too_large(self) -> ApiError:
        """The refusal of a body that is too large by itself."""
        return ApiError(
            f"the request is larger than {self._owner.limit:,} bytes; send fewer or smaller pictures", 413
        )

    def _crowded(self) -> ApiError:
        return ApiError(
            "the requests that are being answered hold too much memory; try again later",
            503,
            headers={"Retry-After": "1"},
        )

    def _late(self) -> ApiError:
        return ApiError(
            f"the request came too slowly: nothing for {self._owner.idle:g} s, or too little; send it again",
            408,
        )

    def release(self) -> None:
        """Give the room back."""
        self._owner.held -= self.size
        self.size = 0

    async def refuse(self, error: ApiError) -> Message:
        """Answer, read on for a while, then close; returns what the application is told."""
        self.refused = True
        self.release()
        if not self._started:
            start, body = _messages(error, self._scope, {"connection": "close"})
            await self._send(start)
            await self._send({**body, "more_body": True})
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._drain(), _DRAIN_SECONDS)
            await self._send({"type": "http.response.body"})
        return {"type": "http.disconnect"}

    async def _drain(self) -> None:
        """A connection that is closed while the client sends would take the answer with it."""
        while (message := await self._receive()).get("more_body"):
            del message


def _declared(scope: Scope) -> int:
    """The Content-Length; 0 without one, and for what is not a number, which servers refuse themselves."""
    text = b"".join(_headers(scope, b"content-length")[:1])
    return int(text[:20]) if text.isdigit() else 0


def _headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


async def _refuse(scope: Scope, send: Send, error: ApiError) -> None:
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 1008})
        return
    for message in _messages(error, scope):
        await send(message)


def _messages(
    error: ApiError, scope: Scope, headers: dict[str, str] | None = None
) -> tuple[Message, Message]:
    """An error as an ASGI answer: its start and its body."""
    body = json.dumps(error.body_at(scope["path"])).encode()
    lines: dict[str, Any] = {"content-type": "application/json", "content-length": str(len(body))}
    lines |= error.headers | (headers or {})
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in lines.items()]
    start = {"type": "http.response.start", "status": error.status, "headers": raw}
    return start, {"type": "http.response.body", "body": body}
