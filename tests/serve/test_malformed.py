"""What is no HTTP, or HTTP that two readers could read in two ways: one short answer, and the end."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Iterator

import pytest

from vtp.serve.http.models import Models
from vtp.serve.logs import Sparing

from .client import CHAT, Site, serving
from .running import exchange

POST = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode()
MALFORMED = {
    "no HTTP": b"hello there\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
    "no Host": b"GET /health HTTP/1.1\r\n\r\n",
    "a header without a colon": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nfoo bar\r\n\r\n",
    "a negative length": POST + b"Content-Length: -4\r\n\r\n",
    "two lengths": POST + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
    "a coding that is not known": POST + b"Transfer-Encoding: gzip\r\n\r\nzz\r\n",
    "bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a chunk that is none": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A server without a bundle: nothing here asks one."""
    with serving(Models({})) as running:
        yield running


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_http_gets_the_usual_error(site: Site, name: str) -> None:
    status, headers, body = exchange(site.port, MALFORMED[name])
    assert (status, headers["content-type"], headers["connection"]) == (400, "application/json", "close")
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error" and "not a valid HTTP/1.1 request" in error["message"]


@pytest.mark.parametrize("version", ["2.0", "3.0", "0.9", "9.9"])
def test_other_versions_are_refused(site: Site, version: str) -> None:
    """What HTTP/2 sends next would be read as something else; 1.x is HTTP/1.1 to everyone (RFC 9110, 2.5)."""
    line = b"GET /health HTTP/%b\r\nHost: 127.0.0.1\r\n\r\n"
    sent = line % version.encode() + line % b"1.1"
    status, headers, body = exchange(site.port, sent)
    assert (status, headers["content-type"], headers["connection"]) == (505, "application/json", "close")
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error" and "speaks HTTP/1.1" in error["message"]
    assert exchange(site.port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")[0] == 505
    for other in (b"1.0", b"1.1", b"1.2"):
        assert exchange(site.port, line % other)[0] == 200


def test_a_body_whose_length_is_given_twice_is_not_read(site: Site) -> None:
    """A proxy that goes by the other one would take the rest for a request of somebody else."""
    both = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n"
    status, headers, body = exchange(site.port, POST + both)
    assert (status, headers["connection"]) == (400, "close")
    assert "both Content-Length and Transfer-Encoding" in json.loads(body)["error"]["message"]


def chunks(body: bytes, size: int, trailers: bytes = b"") -> bytes:
    """A chunked request."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    coded = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return POST + b"Transfer-Encoding: chunked\r\n\r\n" + coded + b"0\r\n" + trailers + b"\r\n"


def test_a_body_in_tiny_chunks_is_refused(site: Site) -> None:
    """Each chunk takes the server as long as a kilobyte does; a few thousand are nobody's intention."""
    status, headers, body = exchange(site.port, chunks(b" " * 5000, 1))
    assert (status, headers["connection"]) == (400, "close")
    assert json.loads(body)["error"]["message"].startswith("the request's body comes in too many tiny chunks")
    for data in (chunks(b" " * 4000, 1), chunks(b" " * 600_000, 100)):
        assert b"is not valid JSON" in exchange(site.port, data)[2]


@pytest.mark.parametrize("trailers", [b"X-Sum: 1\r\n", b"Host: evil.test\r\nContent-Length: 3\r\n"])
def test_trailers_change_nothing(site: Site, trailers: bytes) -> None:
    status, _, body = exchange(site.port, chunks(b"{}", 1, trailers))
    assert status == 400 and json.loads(body)["error"]["param"] == "messages"


def test_requests_in_a_row_are_answered_in_their_order(site: Site) -> None:
    """What comes after something that is no HTTP is not read."""
    get = b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    paths = [b"/health/ready", b"/nowhere", b"/api/version", b"/v1/models"]
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as raw:
        raw.sendall(b"".join(get % path for path in paths) * 5 + b"nonsense\r\n\r\n" + get % b"/nowhere")
        file = raw.makefile("rb").read()
    found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", file)]
    assert found == [200, 404, 200, 200] * 5 + [400]


def test_a_client_that_waits_for_100_is_told(site: Site) -> None:
    """To go on, or at once why not."""
    for host, status in ((b"127.0.0.1", b"HTTP/1.1 100"), (b"evil.test", b"HTTP/1.1 403")):
        head = b"POST %b HTTP/1.1\r\nHost: %b\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
        with socket.create_connection(("127.0.0.1", site.port), timeout=10) as raw:
            raw.sendall(head % (CHAT.encode(), host))
            assert raw.recv(12) == status


def test_no_traceback_and_no_line_for_each(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(25):
        for data in MALFORMED.values():
            exchange(site.port, data)
    records = [one for one in caplog.records if one.name.startswith(("uvicorn", "asyncio"))]
    assert len(records) <= 3 and not any(one.exc_info for one in records)


def test_the_log_is_sparing(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("test-sparing")
    log.addFilter(Sparing())
    for number in range(1000):
        log.warning("again, from %s", number)
        if not number % 100:
            log.error("an error")
    texts = [one.getMessage() for one in caplog.records if one.name == log.name]
    assert texts.count("an error") == 10
    assert [text for text in texts if text != "an error"] == [
        "again, from 0",
        "again, from 9 (10 times so far)",
        "again, from 99 (100 times so far)",
        "again, from 999 (1000 times so far)",
    ]
