"""What the one who starts a server chose; every field has a safe default."""

from __future__ import annotations

from dataclasses import dataclass, field

from vtp.serve.http.pictures.sources import MediaLimits


@dataclass(frozen=True)
class Settings:
    """How requests are admitted and answered.

    key            clients must send it as a bearer token; None: nobody asks for one
    allowed_hosts  names of the Host header beside loopback's, for those who reach the server by another name
    cors_origins   origins whose pages may call the server from a browser
    media_domains  domains from which pictures may be fetched; () : only data: URLs are taken
    media          bounds of a request's pictures
    body_bytes     most bytes of a request's body
    ping_seconds   a stream that has nothing to say sends a comment after this time
    grace_seconds  how long requests may go on after the server was told to stop
    """

    key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    media_domains: tuple[str, ...] = ()
    media: MediaLimits = field(default_factory=MediaLimits)
    body_bytes: int = 64 << 20
    ping_seconds: float = 5.0
    grace_seconds: float = 30.0
