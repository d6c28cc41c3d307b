"""One request on its way to a replica, and its answer on the way back: ASGI messages, some at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope

_running: set[asyncio.Task[None]] = set()  # the loop itself keeps no task alive


@dataclass(frozen=True)
class Call:
    """What a replica is told of a request, beside its body: no key, no address, no other header."""

    method: str
    path: str
    content_type: bytes = b""

    def scope(self, size: int) -> Scope:
        """For the application in the replica, as from a client on its own machine."""
        headers = [(b"host", b"localhost"), (b"content-length", b"%d" % size)]
        if self.content_type:
            headers.append((b"content-type", self.content_type))
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode("utf-8", "surrogateescape"),
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "client": None,
            "server": None,
        }


async def answered(app: ASGIApp, call: Call, body: bytes) -> AsyncGenerator[list[Message], None]:
    """An application's answer, as it comes; what came meanwhile is together. Raises what it raises.

    A client that stops reading has gone away: the application gets a disconnect.
    """
    given = [body]
    del body
    gone = asyncio.Event()
    sent: asyncio.Queue[Message | None] = asyncio.Queue()

    async def receive() -> Message:
        if given:
            return {"type": "http.request", "body": given.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(call.scope(len(given[0])), receive, sent.put)
        finally:
            sent.put_nowait(None)

    work = asyncio.create_task(run())
    _running.add(work)
    work.add_done_callback(_ended)
    try:
        over = False
        while not over:
            some: list[Any] = [await sent.get()]
            while not sent.empty():
                some.append(sent.get_nowait())
            over = some[-1] is None
            yield some[:-1] if over else some
        await work
    finally:
        gone.set()


def _ended(work: asyncio.Task[None]) -> None:
    _running.discard(work)
    if not work.cancelled():
        work.exception()  # the reader of the answer got it, if there was one
