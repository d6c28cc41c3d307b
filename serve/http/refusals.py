"""Errors of the runtime as errors of the API: a status, and a text that tells nothing it should not."""

from __future__ import annotations

import logging
import math

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import RequestError, shown
from vtp.runtime.constrained.errors import FormatBusy, FormatError
from vtp.runtime.media.pictures import PictureError
from vtp.runtime.prompt.prompter import PromptTooLong
from vtp.runtime.scheduler import Closed, QueueFull
from vtp.serve.http.errors import FAILED, ApiError, holds_no_secret
from vtp.serve.logs import Sparing, because_of

# A logger of its own, for its lines are sparing, whatever the client repeats.
_log = logging.getLogger("vtp.serve.refusals")
_log.addFilter(Sparing())

# The field that an error is about, by its text's first word; other errors are about the conversation.
_PARAMS = {"keep_tokens": "vtp.keep_tokens", "budget_ms": "vtp.budget_ms"}


def told(error: Exception, running: bool = False) -> ApiError:
    """What a client is told of an error of the runtime.

    running  the request had begun: what is not the request's own fault is then the server's
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        seconds = max(1, math.ceil(error.retry_after))
        return ApiError(
            f"the queue is full; try again in about {seconds} s",
            429,
            code="queue_full",
            headers={"Retry-After": str(seconds)},
        )
    if isinstance(error, Closed):
        return ApiError("the server is stopping; try again later", 503, headers={"Retry-After": "1"})
    if isinstance(error, FormatBusy):
        return ApiError(_shown(error), 503, param="response_format", headers={"Retry-After": "5"})
    if isinstance(error, FormatError):
        return ApiError(_shown(error), param="response_format")
    if isinstance(error, PromptTooLong):
        return ApiError(_shown(error), param="messages", code="context_length_exceeded")
    if isinstance(error, UsageError | PictureError) or (isinstance(error, VtpError) and not running):
        return ApiError(_shown(error), param=_PARAMS.get(str(error).partition(" ")[0], "messages"))
    return failure(error)


def failure(error: BaseException) -> ApiError:
    """Status 500 for whatever nobody expected: it is logged, and clients learn nothing."""
    text = "a request failed: %s: %s"
    _log.error(text, type(error).__name__, shown(error), exc_info=error, extra=because_of(error))
    return ApiError(FAILED, 500)


def _shown(error: VtpError) -> str:
    """The error's own text, if it holds nothing that clients should not see: least of all Pillow's words."""
    text = str(error)
    if isinstance(error, PictureError) and error.__cause__ is not None:
        return "a picture's file is truncated or damaged; send the whole file"
    if isinstance(error, RequestError) or holds_no_secret(text):
        return text
    _log.warning("a request was refused: %s", text, extra=because_of(error))
    return "this request cannot be served; the server's log says why"
