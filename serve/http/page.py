"""The page at `/`: one file, read once and sent whole, whose policy lets it talk to its own server only."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
_CAMERA = {"Permissions-Policy": "camera=(self)"}


def page_route(name: str = "index.html", headers: Mapping[str, str] = _CAMERA) -> Route:
    """`GET /` and `HEAD /` for a file of `page/`, with `headers` beside those that every page has."""
    html = files("vtp.serve").joinpath("page", name).read_text(encoding="utf-8")
    headers = {
        **headers,
        "Content-Security-Policy": policy(html),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }

    async def page(request: Request) -> Response:
        return Response(html, media_type="text/html", headers=headers)

    return Route("/", page)


def policy(html: str) -> str:
    """A content security policy under which the page's own script and style run, and nothing else does."""
    own: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        own[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(own['script'])}",
            f"style-src {' '.join(own['style'])}",
            "img-src 'self' data: blob:",
            "media-src 'self' blob: mediastream:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
