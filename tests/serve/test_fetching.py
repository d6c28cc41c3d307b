"""Fetching: a real server at the other end of a real socket."""

from __future__ import annotations

import asyncio
import functools
import gzip
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtp.serve.http.errors import ApiError
from vtp.serve.http.pictures.fetching import Fetcher, is_public
from vtp.serve.http.pictures.sources import MediaLimits, read_picture

PARAM = "messages.0.content.0.image_url"


def picture() -> bytes:
    file = BytesIO()
    Image.new("RGB", (5, 3), "red").save(file, "PNG")
    return file.getvalue()


class Site(BaseHTTPRequestHandler):
    """Answers by path; `server.seen` has (host, path, headers) of what was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.headers["Host"], self.path, dict(self.headers)))  # type: ignore[attr-defined]
        getattr(self, "answer_" + self.path.strip("/").partition("?")[0].partition("/")[0])()

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_picture(self) -> None:
        self.reply(200, picture())

    def answer_missing(self) -> None:
        self.reply(404, b"secret")

    def answer_gzip(self) -> None:
        self.reply(200, gzip.compress(b"\0" * 10_000_000), Content_Encoding="gzip")

    def answer_to(self) -> None:
        """/to?PLACE redirects there."""
        self.reply(302, Location=self.path.partition("?")[2])

    def answer_loop(self) -> None:
        count = int(self.path.rpartition("/")[2])
        self.reply(307, Location=f"/loop/{count - 1}" if count else "/picture")

    def answer_nowhere(self) -> None:
        self.reply(301)

    def answer_large(self) -> None:
        self.reply(200, bytes(5000))

    def answer_endless(self) -> None:
        """Chunks without a length, for ever."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"400\r\n" + bytes(1024) + b"\r\n")
        except OSError:
            self.server.hung_up.set()  # type: ignore[attr-defined]

    def answer_slow(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            self.server.hung_up.set()  # type: ignore[attr-defined]

    def answer_short(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"x")
        self.close_connection = True

    def answer_headers(self) -> None:
        self.reply(200, picture(), X_Long="x" * 40_000)

    def answer_garbage(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.9 secret\r\n")
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class Remote:
    """A server on loopback, under whatever name the test's resolver gives it."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Site)
        self.server.seen, self.server.hung_up = [], threading.Event()
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        self.looked_up: list[str] = []
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def seen(self) -> list[tuple[str, str, dict[str, str]]]:
        return self.server.seen  # type: ignore[no-any-return]

    async def resolver(self, host: str, port: int) -> list[str]:
        """Every name leads here, but those that begin with "private"."""
        self.looked_up.append(host)
        return ["10.0.0.1"] if host.startswith("private") else ["127.0.0.1"]

    def fetcher(self, **options: Any) -> Fetcher:
        options = {"resolver": self.resolver, "permitted": lambda one: one == "127.0.0.1", **options}
        return Fetcher(**options)

    def get(self, path: str, host: str = "pictures.test", limit: int = 4000, **options: Any) -> bytes:
        domains = options.pop("domains", (f"{host}:{self.port}",))
        url = f"{options.pop('scheme', 'http')}://{host}:{self.port}{path}"
        return asyncio.run(self.fetcher(**options).fetch(url, domains, limit, PARAM))

    def refusal(self, path: str, **options: Any) -> str:
        with pytest.raises(ApiError) as caught:
            self.get(path, **options)
        error = caught.value
        assert (error.status, error.param) == (400, PARAM)
        assert not [
            word for word in ("127.0.0.1", "10.0.0.1", "secret", "Errno", "\n") if word in error.message
        ]
        return error.message

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def remote() -> Iterator[Remote]:
    site = Remote()
    yield site
    site.close()


# -- domains ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.test/picture",
        "http://pictures.test@evil.test/picture",
        "http://user@pictures.test/picture",
        "http://pictures.test:x@evil.test/",
        "http://evil.test\\@pictures.test/",
        "http://evil.test\\.pictures.test/",
        "http://evil.test#@pictures.test/",
        "http://evil.test?@pictures.test/",
        "http://pictures.test\t.evil.test/",
        "http://pictures.test\n/",
        "http://pictures.test /",
        " http://pictures.test/",
        "http:///pictures.test",
        "http:pictures.test",
        "http://",
        "http://[pictures.test/",
        "http://[::1]/",
        "http://pictures.test:99999/",
        "http://pictures.test:x/",
        "http://pictures.test:8081/",
        "http://pictures.test./picture",
        "http://pictures。test/picture",
        "http://127.1/picture",
        "http://2130706433/picture",
        "http://pictures.test/" + "x" * 5000,
    ],
)
def test_urls_that_lead_elsewhere_are_refused_before_any_look_up(url: str, remote: Remote) -> None:
    with pytest.raises(ApiError) as caught:
        asyncio.run(remote.fetcher().fetch(url, ("pictures.test",), 4000, PARAM))
    assert caught.value.status == 400
    assert (remote.looked_up, remote.seen) == ([], [])


def test_nothing_is_fetched_by_default(remote: Remote) -> None:
    assert "not fetched" in remote.refusal("/picture", domains=())
    assert remote.looked_up == []


# -- the wire ------------------------------------------------------------------------------------------------


def test_a_picture_is_fetched_from_the_checked_address(remote: Remote) -> None:
    url = f"http://pictures.test:{remote.port}/picture?a=1&b=%20#part"
    domains = (f"*.test:{remote.port}",)
    found = asyncio.run(
        read_picture(
            url, limits=MediaLimits(), allowed_domains=domains, param=PARAM, fetcher=remote.fetcher()
        )
    )
    assert found.image.data == picture()
    [(host, path, headers)] = remote.seen
    assert (host, path) == (f"pictures.test:{remote.port}", "/picture?a=1&b=%20")
    assert headers["Accept-Encoding"] == "identity" and "Authorization" not in headers
    assert remote.looked_up == ["pictures.test"]


def test_a_private_address_is_never_connected_to(remote: Remote) -> None:
    """With the real rule: the server is there, and listens on loopback."""
    message = remote.refusal("/picture", permitted=is_public)
    assert "not public" in message and remote.seen == []


def test_one_private_address_among_several_is_enough(remote: Remote) -> None:
    async def resolver(host: str, port: int) -> list[str]:
        return ["127.0.0.1", "10.0.0.1"]

    assert "not public" in remote.refusal("/picture", resolver=resolver)
    assert remote.seen == []


def test_names_are_looked_up_once(remote: Remote) -> None:
    """A name whose second answer would be another one (DNS rebinding) leads nowhere else."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])

    async def resolver(host: str, port: int) -> list[str]:
        return next(answers)

    assert remote.get("/picture", resolver=resolver) == picture()
    assert next(answers) == ["10.0.0.1"]


def test_another_address_is_tried_if_the_first_does_not_answer(remote: Remote) -> None:
    async def resolver(host: str, port: int) -> list[str]:
        return ["127.0.0.2", "127.0.0.1"]

    def permitted(address: str) -> bool:
        return address.startswith("127.")

    assert remote.get("/picture", resolver=resolver, permitted=permitted) == picture()


def test_the_real_resolver_is_the_systems(remote: Remote) -> None:
    fetcher = Fetcher(permitted=lambda one: one in ("127.0.0.1", "::1"))
    url = f"http://localhost:{remote.port}/picture"
    domains = (f"localhost:{remote.port}",)
    assert asyncio.run(fetcher.fetch(url, domains, 4000, PARAM)) == picture()
    with pytest.raises(ApiError, match="not public"):
        asyncio.run(Fetcher().fetch(url, domains, 4000, PARAM))


def test_three_redirects_are_followed(remote: Remote) -> None:
    assert remote.get("/loop/2") == picture()
    assert "more than 3 times" in remote.refusal("/loop/3")


@pytest.mark.parametrize(
    "place",
    [
        "http://evil.test/picture",
        "//evil.test/",
        "file:///etc/passwd",
        "ftp://pictures.test/",
        "http://127.0.0.1/",
    ],
)
def test_redirects_to_other_places_are_refused(place: str, remote: Remote) -> None:
    remote.refusal(f"/to?{place}")
    assert remote.looked_up == ["pictures.test"]


def test_a_redirect_to_a_private_address_is_refused(remote: Remote) -> None:
    domains = (f"*.test:{remote.port}",)
    place = f"http://private.test:{remote.port}/picture"
    assert "not public" in remote.refusal(f"/to?{place}", domains=domains)
    assert [path for _, path, _ in remote.seen] == [f"/to?{place}"]


def test_a_redirect_without_a_place_is_refused(remote: Remote) -> None:
    assert "not a URL" in remote.refusal("/nowhere")


def test_the_size_limit_holds_with_and_without_a_length(remote: Remote) -> None:
    assert len(remote.get("/large", limit=5000)) == 5000
    assert "larger than 4,999" in remote.refusal("/large", limit=4999)
    assert "larger than 4,000" in remote.refusal("/endless")
    assert remote.server.hung_up.wait(5)


def test_the_time_limit_is_for_everything(remote: Remote) -> None:
    assert "within 0.3 s" in remote.refusal("/slow", seconds=0.3)
    assert remote.server.hung_up.wait(5)


def test_a_resolver_that_hangs_ends_in_time(remote: Remote) -> None:
    async def resolver(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    assert "within 0.2 s" in remote.refusal("/picture", resolver=resolver, seconds=0.2)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/missing", "status 404"),
        ("/gzip", "compressed"),
        ("/short", "could not be read"),
        ("/headers", "could not be read"),
        ("/garbage", "could not be read"),
    ],
)
def test_bad_answers(path: str, part: str, remote: Remote) -> None:
    assert part in remote.refusal(path)


def test_nobody_listens() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]

        async def resolver(host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        fetcher = Fetcher(resolver, lambda one: True)
        with pytest.raises(ApiError, match="could not be read"):
            asyncio.run(fetcher.fetch(f"http://a.test:{port}/", (f"a.test:{port}",), 9, PARAM))


def test_a_name_that_does_not_exist() -> None:
    async def resolver(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(ApiError, match="could not be read"):
        asyncio.run(Fetcher(resolver).fetch("http://a.test/", ("a.test",), 9, PARAM))


# -- TLS -----------------------------------------------------------------------------------------------------


@functools.cache
def _certificate(folder: Path) -> Path:
    """A certificate for pictures.test, signed by itself, made by openssl."""
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-subj", "/CN=x", "-addext", "subjectAltName=DNS:pictures.test", "-days", "2"]
    command += ["-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Remote, ssl.SSLContext]]:
    folder = _certificate(tmp_path_factory.getbasetemp())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    site = Remote(context)
    yield site, ssl.create_default_context(cafile=str(folder / "cert.pem"))
    site.close()


def test_tls_checks_the_hosts_name(secure: tuple[Remote, ssl.SSLContext]) -> None:
    remote, trust = secure
    assert remote.get("/picture", scheme="https", trust=trust) == picture()
    assert "could not be read" in remote.refusal("/picture", scheme="https", trust=trust, host="other.test")


def test_tls_trusts_what_the_system_trusts(secure: tuple[Remote, ssl.SSLContext]) -> None:
    assert "could not be read" in secure[0].refusal("/picture", scheme="https")


def test_a_redirect_from_https_to_http_is_refused(secure: tuple[Remote, ssl.SSLContext]) -> None:
    remote, trust = secure
    place = f"http://pictures.test:{remote.port}/picture"
    assert "https to http" in remote.refusal(f"/to?{place}", scheme="https", trust=trust)
