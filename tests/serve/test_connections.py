"""Clients that do not ask, do not read, or send a byte now and then: none is waited for."""

from __future__ import annotations

import resource
import socket
import threading
from collections.abc import Iterator

import pytest
from starlette.types import Receive, Scope, Send

from vtp.serve import server
from vtp.serve.connections import Connection
from vtp.serve.http.admission import BodyLimit
from vtp.serve.http.models import Models
from vtp.serve.settings import Settings

from .client import PATIENCE, Site, serving, wait_until

HEAD = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A server without a bundle: nothing here asks one."""
    with serving(Models({})) as running:
        yield running


def opened(site: Site, data: bytes = b"") -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", site.port), timeout=15)
    raw.sendall(data)
    return raw


def ended(raw: socket.socket) -> bool:
    """Read to the end; False after the time-out."""
    try:
        while raw.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("begun", [b"", HEAD, b"G"])
def test_a_request_that_is_not_ended_is_not_waited_for(
    site: Site, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.2)
    with opened(site, begun) as raw:
        assert ended(raw)


def test_headers_that_trickle_are_not_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.5)
    with opened(site, HEAD + b"X: ") as raw:
        raw.settimeout(0.02)
        for _ in range(1000):
            try:
                raw.sendall(b"a")
                if not raw.recv(100):
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
    raise AssertionError("it was waited for")


def test_a_connection_whose_request_was_answered_is_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.2)
    with opened(site) as raw:
        raw.settimeout(0.6)
        raw.sendall(HEAD + b"\r\n")
        assert not ended(raw)  # the answer, and then nothing for longer than a head may take
        raw.sendall(HEAD + b"\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 200")


def test_more_connections_than_there_is_room_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "most", 10)
    held = site.server.server_state.connections
    idle = [opened(site) for _ in range(50)]
    try:
        wait_until(lambda: len(held) == 10)
        assert site.send("/health").status == 200
        assert ended(idle[0]) and len(held) <= 10
    finally:
        for raw in idle:
            raw.close()
    wait_until(lambda: not held)


def test_connections_leave_files_for_the_rest() -> None:
    assert Connection.most <= max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def test_a_client_that_does_not_read_is_not_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "stall_seconds", 0.3)
    held = site.server.server_state.connections
    with unread(site):
        wait_until(lambda: held)
        wait_until(lambda: not held)


def unread(site: Site) -> socket.socket:
    """A connection on which more is written than the kernel takes, and nothing is read."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", site.port))
    raw.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 700)  # each answer is 20 KiB
    return raw


def test_the_end_is_not_held_up_by_those_who_do_not_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And there is no traceback for each of them."""
    monkeypatch.setattr(server, "_CLOSING", 1)
    with serving(Models({}), Settings(grace_seconds=0.3)) as site:
        stuck = [unread(site) for _ in range(3)]
        wait_until(lambda: len([one for one in site.server.server_state.connections if one._stall]) == 3)
    assert not site.server.server_state.connections and not caplog.records
    for raw in stuck:
        raw.close()


def test_a_body_that_trickles_is_not_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = site.server.config.loaded_app
    while not isinstance(guard, BodyLimit):
        guard = getattr(guard, "app", None) or getattr(guard, "_app", None) or guard.middleware_stack
    monkeypatch.setattr(guard, "idle", 0.5)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n"
    with opened(site, head) as raw:
        raw.settimeout(0.1)
        for _ in range(100):
            raw.sendall(b" ")
            try:
                assert raw.recv(100).startswith(b"HTTP/1.1 408")
                return
            except TimeoutError:
                continue
    raise AssertionError("it was waited for")


def test_an_offer_of_http_2_is_passed_over(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with opened(site, HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n") as raw:
        assert raw.recv(100).startswith(b"HTTP/1.1 200")
    assert not caplog.records


def test_who_leaves_after_a_further_request_is_noticed() -> None:
    """uvicorn stops to read once something follows a request, and would not see its client go away."""
    asked, gone = threading.Event(), threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            continue
        asked.set()
        if (await receive())["type"] == "http.disconnect":
            gone.set()

    with serving(Models({}), app=app) as site:
        for more in (b"\r\n", HEAD + b"\r\n"):
            with opened(site, HEAD + b"\r\n") as raw:
                assert asked.wait(PATIENCE)
                raw.sendall(more)
            assert gone.wait(PATIENCE)
            asked.clear()
            gone.clear()
