"""Fetches pictures from domains that the server's owner allowed, and connects to public addresses only.

One parser reads a URL, what it read is checked, and the connection goes to the very address that was checked:
no second look-up that could answer otherwise, no redirect that is not checked again in full.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from vtp.engines.errors import UsageError, shown
from vtp.serve.http.errors import ApiError, let_go

__all__ = ["AllowedDomain", "Fetcher", "is_public", "resolve"]

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*")
_ENTRY = re.compile(rf"(?P<any>\*\.)?(?P<host>{_HOST.pattern})(?::(?P<port>[0-9]{{1,5}}))?")
_UNSAFE = re.compile(r"[^\x21-\x7e]|\\")  # controls, spaces, what is not ASCII, backslashes: parsers disagree
_CHUNK = 2**14
_LONGEST = 4096  # characters of a URL
_HEADERS = 2**14  # bytes of the answer's headers
_ADDRESSES = 4  # that are tried, of one host

# Addresses that stand for others, and so could stand for private ones (translated, tunnelled, embedded), and
# those of documents, which older Pythons take for public.
_INDIRECT = tuple(
    ip_network(text)
    for text in (
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2002::/16",
        "2001::/32",
        "::/96",
        "192.88.99.0/24",
        "3fff::/20",
    )
)

Resolver = Callable[[str, int], Awaitable[list[str]]]


class _Refused(Exception):
    """A URL or an answer that is refused; one line for the client."""


@dataclass(frozen=True)
class AllowedDomain:
    """One allowed domain: `host`, or everything below it (`below`); `port` None: the scheme's own."""

    host: str
    below: bool
    port: int | None

    @classmethod
    def parse(cls, text: str) -> AllowedDomain:
        """Read "example.org", "*.example.org" or either with ":8080"; UsageError for anything else."""
        found = _ENTRY.fullmatch(text.lower())
        port = int(found["port"]) if found and found["port"] else None
        if not found or port == 0 or (port or 0) > 65535:
            raise UsageError(
                f"'{shown(text, 60)}' is not a valid domain; give a name such as example.org, *.example.org "
                "or example.org:8080"
            )
        return cls(found["host"], bool(found["any"]), port)

    def allows(self, host: str, port: int, scheme: str) -> bool:
        """Whether a URL of this host and port may be fetched."""
        named = host.endswith(f".{self.host}") if self.below else host == self.host
        return named and port == (self.port or _PORTS[scheme])


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet's own: not private, loopback, link-local, shared,
    multicast, reserved, unspecified, nor an IPv6 address that stands for an IPv4 one."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv6Address) and (ip.ipv4_mapped or ip.scope_id or ip.is_site_local):
        return False
    special = ip.is_multicast or ip.is_reserved or ip.is_private or ip.is_loopback or ip.is_link_local
    indirect = any(ip in network for network in _INDIRECT if network.version == ip.version)
    return ip.is_global and not (special or indirect or ip.is_unspecified)


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, by the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)  # SOCK_STREAM
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True)
class _Target:
    """A URL that may be fetched."""

    scheme: str
    host: str
    port: int
    path: str
    url: str

    @property
    def host_header(self) -> str:
        return self.host if self.port == _PORTS[self.scheme] else f"{self.host}:{self.port}"


class Fetcher:
    """Reads files of http(s) URLs.

    resolver   (host, port) -> addresses
    permitted  whether an address may be connected to
    trust      TLS settings; None: the system's certificates, and the host's name must be in the server's
    seconds    for everything: names, redirects, connecting and reading
    redirects  followed at most
    """

    def __init__(
        self,
        resolver: Resolver = resolve,
        permitted: Callable[[str], bool] = is_public,
        trust: ssl.SSLContext | None = None,
        seconds: float = 10.0,
        redirects: int = 3,
    ) -> None:
        self._resolver = resolver
        self._permitted = permitted
        self._trust = trust
        self._seconds = seconds
        self._redirects = redirects

    async def fetch(self, url: str, allowed_domains: tuple[str, ...], limit: int, param: str) -> bytes:
        """The file of a URL, at most `limit` bytes. ApiError (400) for all that is refused, or fails."""
        try:
            return await asyncio.wait_for(self._follow(url, allowed_domains, limit), self._seconds)
        except (_Refused, OSError, asyncio.TimeoutError, UnicodeError, h11.ProtocolError) as error:
            reason = self._reason(error)
            let_go(error)
        raise ApiError(reason, param=param, code="invalid_image_url")

    def _reason(self, error: Exception) -> str:
        """One line for the client; nothing of the system's or a library's words."""
        if isinstance(error, _Refused):
            return str(error)
        if isinstance(error, asyncio.TimeoutError):
            return f"the picture's URL was not answered within {self._seconds:g} s; send a data: URL"
        return "the picture's URL could not be read; check it, or send the picture as a data: URL"

    async def _follow(self, url: str, allowed_domains: tuple[str, ...], limit: int) -> bytes:
        """Read a URL, or what it is redirected to; every hop is checked alike."""
        domains = [AllowedDomain.parse(entry) for entry in allowed_domains]
        target = _target(url, domains)
        for _ in range(self._redirects + 1):
            answer = await self._ask(target, limit)
            if isinstance(answer, bytes):
                return answer
            target = _next_target(target, answer, domains)
        raise _Refused(
            f"the picture's URL is redirected more than {self._redirects} times; give the last one"
        )

    async def _ask(self, target: _Target, limit: int) -> bytes | str:
        """The body of an answer, or where it redirects to."""
        reader, writer = await self._connect(target)
        exchange = _Exchange(target)
        try:
            writer.write(exchange.request())
            return await exchange.read(reader, limit)
        finally:
            writer.transport.abort()

    async def _connect(self, target: _Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to an address that was checked; all of the host's must pass."""
        addresses = await self._resolver(target.host, target.port)
        if not addresses or not all(self._permitted(address) for address in addresses):
            raise _Refused("the picture's domain leads to an address that is not public; send a data: URL")
        failure: OSError = OSError()
        for address in addresses[:_ADDRESSES]:
            try:
                return await self._open(address, target)
            except ssl.SSLError:
                raise
            except OSError as error:
                failure = error
        raise failure

    async def _open(self, address: str, target: _Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The address is a literal, so that nothing is looked up again; TLS is for the host's name."""
        if target.scheme == "http":
            return await asyncio.open_connection(address, target.port, limit=_CHUNK)
        trust = self._trust or ssl.create_default_context()
        return await asyncio.open_connection(
            address, target.port, limit=_CHUNK, ssl=trust, server_hostname=target.host
        )


class _Exchange:
    """One request and its answer, by h11."""

    def __init__(self, target: _Target) -> None:
        self._target = target
        self._connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEADERS)

    def request(self) -> bytes:
        """The bytes to send."""
        headers = {
            "Host": self._target.host_header,
            "User-Agent": "vtp",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        request = h11.Request(method="GET", target=self._target.path, headers=list(headers.items()))
        return b"".join(
            (self._connection.send(request) or b"", self._connection.send(h11.EndOfMessage()) or b"")
        )

    async def read(self, reader: asyncio.StreamReader, limit: int) -> bytes | str:
        """The body, at most `limit` bytes, or the place that it is redirected to."""
        body = bytearray()
        while not isinstance(event := await self._event(reader), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                if event.status_code in _REDIRECTS:
                    return _header(event, b"location")
                _check_answer(event, limit)
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > limit:
                    raise _too_large(limit)
        return bytes(body)

    async def _event(self, reader: asyncio.StreamReader) -> h11.Event:
        """The next event of the answer; informational ones among them."""
        while True:
            event = self._connection.next_event()
            if event is h11.NEED_DATA:
                self._connection.receive_data(await reader.read(_CHUNK))
            elif isinstance(event, h11.Event):
                return event
            else:  # paused: something follows the answer, which nobody asked for
                raise h11.RemoteProtocolError("more than one answer")


def _target(url: str, domains: list[AllowedDomain]) -> _Target:
    """Read a URL, once; what is returned may be fetched."""
    if len(url) > _LONGEST or _UNSAFE.search(url):
        raise _Refused(
            "the picture's URL holds a space, a backslash or another character that must be written as %XX, "
            f"or more than {_LONGEST:,} characters"
        )
    parts, port = _split(url)
    host = parts.hostname or ""
    if "@" in parts.netloc or not _HOST.fullmatch(host):
        raise _Refused("the picture's URL must name a host, and no user: https://example.org/picture.jpg")
    if not any(domain.allows(host, port, parts.scheme) for domain in domains):
        raise _Refused(
            "pictures are not fetched from the domain of the picture's URL; send the picture as a data: URL, "
            "or have the server's owner allow it (vtp-serve --allow-media-domain)"
        )
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Target(parts.scheme, host, port, path, url)


def _split(url: str) -> tuple[SplitResult, int]:
    """The URL's parts, and its port."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _Refused("the picture's URL is not valid: check its host and port") from None
    if parts.scheme not in _PORTS:
        raise _Refused("the picture's URL leads to another scheme than http and https; give the file's own")
    return parts, _PORTS[parts.scheme] if port is None else port


def _next_target(target: _Target, location: str, domains: list[AllowedDomain]) -> _Target:
    """Where a redirect leads, checked as the first URL was."""
    if not location or _UNSAFE.search(location):
        raise _Refused("the picture's URL is redirected to something that is not a URL; give the last one")
    found = _target(urljoin(target.url, location), domains)
    if target.scheme == "https" and found.scheme != "https":
        raise _Refused("the picture's URL is redirected from https to http; give the last one")
    return found


def _check_answer(answer: h11.Response, limit: int) -> None:
    """Refuse an answer by its status and headers."""
    if answer.status_code != 200:
        raise _Refused(f"the picture's URL was answered with status {answer.status_code}, not 200; check it")
    if _header(answer, b"content-encoding").lower() not in ("", "identity"):
        raise _Refused("the picture's URL was answered with a compressed file; send a data: URL")
    length = _header(answer, b"content-length")
    if length and int(length) > limit:
        raise _too_large(limit)


def _header(answer: h11.Response, name: bytes) -> str:
    return dict(answer.headers).get(name, b"").decode("latin-1")


def _too_large(limit: int) -> _Refused:
    return _Refused(f"the file of the picture's URL is larger than {limit:,} bytes; give a smaller one")
