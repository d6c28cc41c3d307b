"""An ASGI application on a real server and a real port, in a thread of the test's own process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def served(app: Any, **options: Any) -> Iterator[int]:
    """The port on which the application answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="warning", lifespan="off", http="h11", **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def exchange(port: int, request: bytes, more: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    """Send bytes and read one answer to its end: status, headers with names in lower case, body."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request + more)
        return answer(connection)


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One answer as it is on the wire; one without a Content-Length goes on until the connection ends."""
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    headers = {}
    while line := file.readline().strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, file.read(int(headers.get("content-length", -1)))


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for a condition; fail if it does not come."""
    end = time.monotonic() + 120  # a busy machine takes its time
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)
