"""What tests of the server share: the real server on a loopback port, and a client that hides nothing."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from vtp.runtime.scheduler import Scheduler
from vtp.serve.http.models import Models
from vtp.serve.server import Server, listen
from vtp.serve.settings import Settings

CHAT = "/v1/chat/completions"
PATIENCE = 60.0


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def text(self) -> str:
        said: str = self.json["choices"][0]["message"]["content"]
        return said

    @property
    def events(self) -> list[Any]:
        """Of a stream: each event's JSON; the end is None, a comment its text."""
        assert self.content.endswith(b"\n\n")
        return [_event(block) for block in self.content.decode().split("\n\n")[:-1]]


def _event(block: str) -> Any:
    if block.startswith(":"):
        return block
    assert block.startswith("data: ") and "\n" not in block
    return None if block == "data: [DONE]" else json.loads(block[6:])


@dataclass(frozen=True)
class Site:
    """A server that runs, and how to speak to it."""

    port: int
    models: Models
    server: Server

    def send(
        self, path: str, body: Any = None, method: str | None = None, headers: Mapping[str, str] = {}
    ) -> Answer:
        """One request on a connection of its own; a body that is neither bytes nor None is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method or ("GET" if data is None else "POST"), path, data, dict(headers))
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.headers.items()), answer.read())
        finally:
            connection.close()

    def chat(self, content: Any = "how many ?", **fields: Any) -> Answer:
        """A chat completion of one user turn, or of `messages`."""
        return self.send(CHAT, {"messages": [{"role": "user", "content": content}], **fields})

    def open_raw(self, body: Any, path: str = CHAT) -> socket.socket:
        """A connection on which a request was sent, and nothing read."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        raw.sendall(head.encode() + data)
        return raw


@contextmanager
def serving(
    schedulers: Mapping[str, Scheduler] | Models, settings: Settings | None = None, app: Any = None
) -> Iterator[Site]:
    """The real server, in a thread, until the block is left. `app` answers instead of its own."""
    models = schedulers if isinstance(schedulers, Models) else Models(schedulers)
    listener = listen("127.0.0.1", 0)
    server = Server(models, settings or Settings(grace_seconds=5), app=app)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Site(listener.getsockname()[1], models, server)
    finally:
        server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def wait_until(true: Any) -> None:
    """Wait for a condition; fail if it does not come."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def data_url(picture: Image.Image, kind: str = "png") -> str:
    """A picture as clients send it."""
    file = BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def shown(picture: Image.Image, **more: Any) -> dict[str, Any]:
    """A message part that holds a picture."""
    return {"type": "image_url", "image_url": {"url": data_url(picture), **more}}


def words(text: str) -> dict[str, Any]:
    """A message part that holds text."""
    return {"type": "text", "text": text}
