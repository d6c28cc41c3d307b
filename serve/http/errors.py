"""What a client is told when a request cannot be answered: OpenAI's body, a status, one clear line."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from typing import Any

# The error type that OpenAI's clients expect with a status.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}

OLLAMA = "/api/"  # below it lie Ollama's endpoints, whose clients read errors of another form
GONE = 499  # the status, in logs and metrics, of a request whose client went away
FAILED = "the server could not answer this request; its log says why"
# Paths, addresses of memory and of machines: none of a client's business. What follows "<" is markup.
_PRIVATE = re.compile(
    r"(?<![\w.<])(?:~|\.{1,2})?/[\w.~-]"  # /home, ./bundle, ../x, ~/x
    r"|(?<!\w)[A-Za-z]:[\\/]"
    r"|\b0x[0-9a-fA-F]{5,}"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}\b"
    r"|\w://"
)


class ApiError(Exception):
    """A request that is refused, or that failed.

    message  one line: what was given, what is allowed, what to do. Never a library's own text, a path or an
             address of ours: texts of `VtpError` may be passed on where they hold none (`holds_no_secret`),
             those of `RequestError` always
    status   of the HTTP answer
    param    the request's field that is meant, such as "messages.0.content"
    code     for programs, such as "context_length_exceeded"
    headers  further headers of the answer, such as Retry-After
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def body_at(self, path: str) -> dict[str, Any]:
        """The error body for a request's path: below /api/, Ollama's."""
        return {"error": self.message} if path.startswith(OLLAMA) else self.body()


def holds_no_secret(text: str) -> bool:
    """Whether a message may be shown to clients: no path of a file, no URL, no address in it."""
    return _PRIVATE.search(text) is None


def let_go(error: BaseException) -> None:
    """Empty the frames that an error came through, once it is told: no local of theirs is needed any more.

    Frames that hold the error which holds them (a task's, a future's) would keep the request's text and
    pictures until Python looks for such rings, a dozen requests of 64 MiB later.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            pending += [one.__cause__, one.__context__]
