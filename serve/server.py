"""The server's process: one port, bundles that load behind it, an end that lets running requests finish."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import shown
from vtp.runtime.commands.console import Terminated
from vtp.serve.connections import uvicorn_config
from vtp.serve.http.app import make_app
from vtp.serve.http.models import Models
from vtp.serve.logs import SPARING
from vtp.serve.settings import Settings

_CLOSING = 5  # seconds for connections whose requests were ended
_BACKLOG = 128


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UsageError for a host that is not this machine's, or a port in use."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"host '{shown(host)}' is not known; give an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or "refused"
        raise UsageError(
            f"cannot listen on {shown(host)} port {port}: {reason}; choose another --port or --host"
        ) from error
    return listener


class Server(uvicorn.Server):
    """uvicorn, but for its end.

    The first SIGTERM or Ctrl-C: new requests get status 503, those that there are go on, for at most
    `grace_seconds`; then they are cancelled. The second one ends it at once.
    """

    def __init__(
        self, models: Models, settings: Settings, access_log: bool = False, app: ASGIApp | None = None
    ) -> None:
        """app: what answers, where that is not `make_app(models, settings)`."""
        answering = app or make_app(models, settings)
        super().__init__(uvicorn_config(answering, access_log=access_log, closing_seconds=_CLOSING))
        logging.getLogger("uvicorn.error").addFilter(SPARING)
        self._models = models
        self.grace_seconds = settings.grace_seconds
        self._deadline: float | None = None
        self.forced: int | None = None  # the signal that came while it was stopping

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take signals, in the main thread, while it serves; uvicorn's own would raise them again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self.handle_exit) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, or end at once if it is stopping."""
        if self._deadline is None:
            self.stop()
        else:
            self.forced = sig
            self.force_exit = self.should_exit = True
            self._models.cancel()
            logging.getLogger("uvicorn.error").disabled = True  # of requests that are cut off

    def stop(self) -> None:
        """Take no more requests, and end when those that there are have ended. Safe from any thread."""
        self._models.stopping = True
        self._deadline = time.monotonic() + self.grace_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's; clients that do not read what is left for them are cut off, before it logs each."""
        cut = asyncio.get_running_loop().call_later(_CLOSING / 2, self._abort)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to end."""
        if self._deadline is not None and (not self.server_state.tasks or time.monotonic() >= self._deadline):
            self._models.cancel()
            self.should_exit = True
        return await super().on_tick(counter)


def run(server: Server, models: Models, listener: socket.socket, load: Callable[[], None]) -> None:
    """Serve until told to stop; `load` adds the models, in a thread, while the port already answers.

    Raises what `load` raises; KeyboardInterrupt if a second signal ended it.
    """
    failures: list[BaseException] = []

    def loading() -> None:
        try:
            load()
        except BaseException as error:
            failures.append(error)
            server.stop()

    thread = threading.Thread(target=loading, name="vtp-loading", daemon=True)
    thread.start()
    try:
        server.run([listener])
    finally:
        models.cancel()
        # A bundle that still loads is waited for: an engine does not like to be cut off amid its work.
        thread.join(0 if server.forced else server.grace_seconds)
        models.close(drain=False)
    _raise(server, failures)


def _raise(server: Server, failures: list[Any]) -> None:
    if failures:
        raise failures[0]
    if server.forced == signal.SIGINT:
        raise KeyboardInterrupt
    if server.forced is not None:
        raise Terminated(server.forced)
    if not server.started:
        raise VtpError("the server did not start; --debug shows why")
