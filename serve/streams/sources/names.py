"""How messages call a source: without user names, passwords and tokens that its address may hold."""

from __future__ import annotations

import re

from vtp.engines.errors import shown

# The user's part runs to the last @ before the path begins, as a password may hold one; or a space.
_USER = re.compile(r"(?<=://)[^/]*@")
# With a / in the password, or without both before the user, FFmpeg opens nothing; messages must not show it.
_MISTYPED = re.compile(r"\b((?:rtsp|http|rtmp)s?:/{0,2})[^/\s@:]*:.*@", re.IGNORECASE | re.DOTALL)
_AFTER_PATH = re.compile(r"(://[^?#]*)[?#].*", re.DOTALL)
# Some cameras take user and password as a part of the path: /user=admin_password=x_channel=1.sdp
_IN_PATH = re.compile(r"(://[^=]*/)[^/=]*=.*", re.DOTALL)


def without_secrets(text: str) -> str:
    """A text in which every URL has lost its user, password, query, fragment, and what follows an = in it.

    A password may have a space in it, so that a text that goes on behind a URL's secrets loses its rest.
    """
    text = _AFTER_PATH.sub(r"\1", _MISTYPED.sub(r"\1…@", _USER.sub("", text)))
    return _IN_PATH.sub(r"\1…", text)


def source_name(text: str) -> str:
    """A source as messages call it: one line, no secrets."""
    return shown(without_secrets(text))
