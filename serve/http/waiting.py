"""What a request waits for: work in a thread, and its client going away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from starlette.requests import Request

_Made = TypeVar("_Made")


async def in_thread(make: Callable[[], _Made], give_up: Callable[[_Made], object]) -> _Made:
    """What `make` gives, made in a thread; should the request end meanwhile, it is handed to `give_up`."""
    work = asyncio.create_task(asyncio.to_thread(make))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(partial(_undo, give_up))
        raise


def _undo(give_up: Callable[[_Made], object], work: asyncio.Task[_Made]) -> None:
    if not work.cancelled() and work.exception() is None:
        give_up(work.result())


async def disconnected(request: Request) -> None:
    """Wait until the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
