"""Who is let in: each check on a real server over a real socket, and all of them together."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vtp.serve.http.admission import BodyLimit, HostCheck, KeyCheck, guarded

from .running import answer, exchange, served, wait_until

KEY = "geheim-schlüssel"
LIMIT = 100_000


async def size(request: Request) -> Response:
    return JSONResponse({"bytes": len(await request.body())})


async def cut(request: Request) -> Response:
    """What an application makes of a client that went away is its own business."""
    try:
        return await size(request)
    except ClientDisconnect:
        return Response("never read", 200)


PATHS = ("/", "/metrics", "/health", "/health/ready", "/healthy", "/v1/models", "/metrics/x", "//", "/cut")
APP = Starlette(
    routes=[Route(path, cut if path == "/cut" else size, methods=["GET", "POST"]) for path in PATHS]
)


def request(
    path: str = "/v1/models", method: str = "GET", host: str | None = "localhost", **headers: str
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *([] if host is None else [f"Host: {host}"]), "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8")


def error_of(body: bytes) -> dict[str, Any]:
    """OpenAI's error body, complete."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error  # type: ignore[no-any-return]


# -- the Host header -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked() -> Iterator[int]:
    with served(HostCheck(APP, ("vtp.example.org", "*.example.net"))) as port:
        yield port


OWN = socket.gethostname()


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "127.0.0.1",
        "127.0.0.1:1",
        "[::1]:8000",
        "a.localhost",
        "robot.local",
        OWN,
        *["192.168.1.7:8000", "vtp.example.org", "VTP.example.org.:80", "a.example.net", "localhost:"],
    ],
)
def test_names_of_the_server_pass(host: str, checked: int) -> None:
    assert exchange(checked, request(host=host))[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.test",
        "evil.test:8000",
        "localhost.evil.test",
        "127.0.0.1.evil.test",
        "example.org",
        "example.net",
        *["notexample.net", "evillocalhost", "xlocal", "vtp.example.org.evil.test", "1.2.3", "127.0.0.1x"],
    ],
)
def test_other_names_are_refused(host: str, checked: int) -> None:
    status, _, body = exchange(checked, request(host=host))
    assert (status, error_of(body)["type"]) == (403, "permission_error")
    assert "evil" not in body.decode()


@pytest.mark.parametrize("host", ["", "a b", "user@localhost", "localhost/x", "[::1", "localhost:80:80"])
def test_what_is_no_host_is_a_bad_request(host: str, checked: int) -> None:
    assert exchange(checked, request(host=host))[0] == 400


def test_without_one_host_header(checked: int) -> None:
    bare = b"GET /v1/models HTTP/1.0\r\n\r\n"
    status, _, body = exchange(checked, bare)
    assert status == 400 and "one Host header" in error_of(body)["message"]
    status, _, _ = exchange(checked, request(Host="localhost"))  # a second one
    assert status == 400


def test_a_star_allows_every_name() -> None:
    with served(HostCheck(APP, ("*",))) as port:
        assert exchange(port, request(host="evil.test"))[0] == 200


# -- the key -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked() -> Iterator[int]:
    with served(KeyCheck(APP, KEY)) as port:
        yield port


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_key_opens(scheme: str, locked: int) -> None:
    assert exchange(locked, request(Authorization=f"{scheme} {KEY}"))[0] == 200


@pytest.mark.parametrize(
    "value",
    [
        "Bearer",
        "Bearer ",
        "Bearer x",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Basic {KEY}",
        KEY,
        f"Bearer{KEY}",
        *["Bearer \x80ÿ", f"Bearer {KEY.upper()}", f"Bearer {KEY} {KEY}", "Bearer " + "x" * 10_000],
    ],
)
def test_other_keys_do_not(value: str, locked: int) -> None:
    status, headers, body = exchange(locked, request(Authorization=value))
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert error_of(body)["type"] == "authentication_error" and KEY not in body.decode()


def test_no_key_and_two_keys(locked: int) -> None:
    assert exchange(locked, request())[0] == 401
    twice = request(Authorization=f"Bearer {KEY}").replace(
        b"\r\n\r\n", f"\r\nauthorization: Bearer {KEY}\r\n\r\n".encode()
    )
    assert exchange(locked, twice)[0] == 401


@pytest.mark.parametrize("path", ["/", "/metrics", "/health", "/health/ready"])
def test_what_is_open(path: str, locked: int) -> None:
    assert exchange(locked, request(path))[0] == 200


@pytest.mark.parametrize(
    "path", ["/healthy", "/metrics/x", "/v1/models", "//", "/x?/health", "/health%2f../v1/models"]
)
def test_what_only_looks_open(path: str, locked: int) -> None:
    assert exchange(locked, request(path))[0] in (401, 404)
    assert exchange(locked, request(path, Authorization="Bearer x"))[0] in (401, 404)


# -- the body ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bounded() -> Iterator[int]:
    with served(BodyLimit(APP, LIMIT)) as port:
        yield port


def chunks(size: int, each: int = 4096) -> bytes:
    whole = b"".join(b"%x\r\n%s\r\n" % (each, bytes(each)) for _ in range(size // each))
    rest = size % each
    return whole + (b"%x\r\n%s\r\n" % (rest, bytes(rest)) if rest else b"") + b"0\r\n\r\n"


def post(port: int, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return exchange(port, request(path, "POST", **headers), body)


def test_bodies_up_to_the_limit_pass(bounded: int) -> None:
    for count in (0, 1, LIMIT):
        assert post(bounded, "/", bytes(count), Content_Length=str(count))[2] == b'{"bytes":%d}' % count
        assert post(bounded, "/", chunks(count), Transfer_Encoding="chunked")[2] == b'{"bytes":%d}' % count


@pytest.mark.parametrize("path", ["/", "/cut"])
def test_larger_bodies_are_refused(path: str, bounded: int) -> None:
    """Whatever the application makes of it, the client reads the same."""
    for body, headers in (
        (bytes(LIMIT + 1), {"Content_Length": str(LIMIT + 1)}),
        (chunks(LIMIT + 1), {"Transfer_Encoding": "chunked"}),
        (chunks(30 * LIMIT), {"Transfer_Encoding": "chunked"}),
    ):
        status, answered, text = post(bounded, path, body, **headers)
        assert (status, answered["connection"]) == (413, "close")
        assert error_of(text)["type"] == "request_too_large" and "100,000 bytes" in text.decode()


def test_the_answer_comes_before_the_body_is_sent(bounded: int) -> None:
    """Nothing of it is sent: the header is enough."""
    assert post(bounded, "/", b"", Content_Length=str(10**15))[0] == 413


def test_a_client_that_asks_first_is_told_before_it_sends(bounded: int) -> None:
    head = {"Content_Length": str(LIMIT + 1), "Expect": "100-continue"}
    assert post(bounded, "/", b"", **head)[0] == 413


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_sends_on_still_reads_the_answer(
    chunked: bool, bounded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection closed too early is reset, and the answer lost with it: 200 MB are sent meanwhile."""
    monkeypatch.setattr("vtp.serve.http.admission._DRAIN_SECONDS", 60.0)  # a busy machine needs more than 5
    total = 200_000_000
    kind = {"Transfer_Encoding": "chunked"} if chunked else {"Content_Length": str(total)}
    piece = chunks(1_000_000, 1_000_000).removesuffix(b"0\r\n\r\n") if chunked else bytes(1_000_000)
    with socket.create_connection(("127.0.0.1", bounded), timeout=30) as connection:
        connection.sendall(request("/", "POST", **kind))
        for _ in range(total // 1_000_000):
            connection.sendall(piece)
        connection.sendall(b"0\r\n\r\n" if chunked else b"")
        assert answer(connection)[0] == 413


def test_a_client_that_never_ends_is_cut_off(bounded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtp.serve.http.admission._DRAIN_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", bounded), timeout=30) as connection:
        connection.sendall(request("/", "POST", Content_Length=str(10**15)))
        ended = threading.Event()

        def send() -> None:
            try:
                while True:
                    connection.sendall(bytes(4096))
            except OSError:
                ended.set()

        sender = threading.Thread(target=send)
        sender.start()
        assert answer(connection)[0] == 413
        assert ended.wait(20)
        sender.join()


def test_bodies_together_hold_so_much() -> None:
    """Two clients whose bodies lack their last byte leave no room for a third, until they are answered."""
    limit = BodyLimit(APP, LIMIT, total_bytes=250_000)
    with served(limit) as port:
        head = request("/", "POST", Content_Length=str(LIMIT))
        connections = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(2)]
        for connection in connections:
            connection.sendall(head + bytes(LIMIT - 1))
        wait_until(lambda: limit.held == 2 * (LIMIT - 1))
        status, headers, body = post(port, "/", bytes(LIMIT), Content_Length=str(LIMIT))
        assert (status, headers["retry-after"], error_of(body)["type"]) == (503, "1", "unavailable_error")
        for connection in connections:
            connection.sendall(b"x")
            assert answer(connection)[0] == 200
            connection.close()
        wait_until(lambda: limit.held == 0)
        assert post(port, "/", bytes(LIMIT), Content_Length=str(LIMIT))[0] == 200
    assert limit.held == 0


def test_clients_that_go_away_give_their_room_back() -> None:
    limit = BodyLimit(APP, LIMIT)
    with served(limit) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(request("/", "POST", Content_Length="1000") + bytes(500))
            wait_until(lambda: limit.held == 500)
        wait_until(lambda: limit.held == 0)
        post(port, "/", chunks(3 * LIMIT), Transfer_Encoding="chunked")
        wait_until(lambda: limit.held == 0)


def test_a_client_that_sends_nothing_is_not_waited_for() -> None:
    with served(BodyLimit(APP, LIMIT, idle_seconds=0.2)) as port:
        status, _, body = exchange(port, request("/", "POST", Content_Length="1000"), bytes(500))
    assert status == 408 and "nothing for 0.2 s" in error_of(body)["message"]


def test_what_came_at_once_buys_no_hours() -> None:
    """After half of a body, a byte now and then is too little, too."""
    head = f"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {1 << 20}\r\n\r\n".encode()
    with (
        served(BodyLimit(APP, 1 << 20, idle_seconds=0.5)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
    ):
        raw.sendall(head + bytes(1 << 19))
        raw.settimeout(0.1)
        for _ in range(100):
            raw.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                assert raw.recv(100).startswith(b"HTTP/1.1 408")
                return
    raise AssertionError("it was waited for")


def test_the_server_goes_on(bounded: int) -> None:
    assert post(bounded, "/", b"", Content_Length="0")[0] == 200


# -- all of them ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guards() -> Iterator[int]:
    origins = ("https://page.example.org",)
    with served(guarded(APP, key=KEY, cors_origins=origins, limit_bytes=LIMIT)) as port:
        yield port


def test_the_key_is_asked_before_a_body_is_read(guards: int) -> None:
    assert post(guards, "/v1/models", b"", Content_Length=str(10**15))[0] == 401
    authorized = {"Authorization": f"Bearer {KEY}", "Content_Length": str(10**15)}
    assert post(guards, "/v1/models", b"", **authorized)[0] == 413


def test_the_name_is_checked_first_and_everywhere(guards: int) -> None:
    for path in ("/", "/health", "/v1/models"):
        assert exchange(guards, request(path, host="evil.test"))[0] == 403


def preflight(port: int, origin: str, host: str = "localhost") -> tuple[int, dict[str, str], bytes]:
    asked = {
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "authorization,content-type",
    }
    return exchange(port, request(method="OPTIONS", host=host, Origin=origin, **asked))


def test_a_preflight_passes_without_a_key(guards: int) -> None:
    status, headers, _ = preflight(guards, "https://page.example.org")
    assert (status, headers["access-control-allow-origin"]) == (200, "https://page.example.org")
    assert "authorization" in headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in headers


def test_other_origins_are_given_nothing(guards: int) -> None:
    status, headers, body = preflight(guards, "https://evil.test")
    assert status == 403 and "access-control-allow-origin" not in headers
    assert "--cors-origin" in json.loads(body)["error"]["message"]
    assert preflight(guards, "https://page.example.org", "evil.test")[0] == 403


def test_a_page_reads_refusals_too(guards: int) -> None:
    status, headers, _ = exchange(guards, request(Origin="https://page.example.org"))
    assert (status, headers["access-control-allow-origin"]) == (401, "https://page.example.org")


def test_no_origin_is_allowed_by_default() -> None:
    with served(guarded(APP)) as port:
        status, headers, _ = preflight(port, "https://page.example.org")
        assert status == 405 and not [name for name in headers if name.startswith("access-control")]
        assert "access-control-allow-origin" not in exchange(port, request(Origin="null"))[1]


@pytest.fixture(scope="module")
def restricted() -> Iterator[int]:
    with served(guarded(APP, cors_origins=("https://page.example.org",))) as port:
        yield port


def test_pages_of_the_servers_own_address_pass(restricted: int) -> None:
    for host, origin in (("[::1]:8000", "http://[::1]:8000"), ("LOCALHOST:80", "http://localhost")):
        asked = request(method="POST", host=host, Content_Length="0", Origin=origin)
        assert exchange(restricted, asked)[0] == 200
    asked = request(method="POST", host="localhost:8000", Content_Length="0", Origin="http://localhost:8001")
    assert exchange(restricted, asked)[0] == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://localhost", 200),
        ("https://page.example.org", 200),
        ("app://notes", 200),
        ("chrome-extension://abc", 200),
        ("http://evil.test", 403),
        ("https://page.example.org.evil.test", 403),
        ("http://localhost:3000", 403),
        ("null", 403),
        ("http://", 403),
        # in any case of letters, and with the port that browsers leave out
        ("HTTP://LocalHost", 200),
        ("http://localhost:80", 200),
        ("https://localhost:443", 200),
        ("https://Page.example.org", 200),
        ("https://page.example.org:443", 200),
        ("http://localhost:443", 403),
        ("HTTP://evil.test", 403),
        ("HtTpS://evil.test", 403),
        ("NULL", 403),
        # no origins, or of the web and yet not of its pages
        *[(f"{scheme}://localhost", 403) for scheme in ("ws", "wss", "ftp", "file", "blob", "data", "FILE")],
        *[
            (text, 403)
            for text in ("ws:", "blob:http://localhost", "http:", "file://", "about:blank", "data:,")
        ],
        *[(text, 403) for text in ("", "localhost", "//localhost", "*", "http:/localhost", "app:", "1x://a")],
        *[
            (f"http://localhost{rest}", 403)
            for rest in ("/", "?", "#", "/x", " http://localhost", ":x", ":123456")
        ],
        *[(f"{scheme}://me@localhost", 403) for scheme in ("http", "app")],
        *[(f"app://{rest}", 403) for rest in ("", "a/b", "a\\b", "a?b", "é", "[::1", "a b", "a:b")],
        ("moz-extension://6c5f2b0e-1b3a", 200),
        ("tauri://localhost", 200),
        ("http://[::1]", 403),
    ],
)
def test_foreign_pages_make_no_work(origin: str | None, status: int, restricted: int) -> None:
    """A form or a plain-text request needs no preflight: what it asks for would be answered, unread."""
    headers = {"Content_Length": "0", **({} if origin is None else {"Origin": origin})}
    found, answered, body = exchange(restricted, request(method="POST", **headers))
    assert found == status
    if status == 403:
        assert "access-control-allow-origin" not in answered and "--cors-origin" in error_of(body)["message"]
