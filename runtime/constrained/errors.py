"""Why an answer cannot be held to the form that was asked for."""

from __future__ import annotations

from vtp.engines.errors import RequestError, VtpError

__all__ = ["FormatBusy", "FormatError", "refused"]


class FormatError(RequestError):
    """A `response_format` that is not one, asks too much, or is not served for this model."""


class FormatBusy(VtpError):
    """Another caller's schema is still being compiled: this one's turn has not come in time."""


def refused(text: str) -> FormatError:
    """The error to raise, which says what it is about."""
    return FormatError(f"response_format: {text}")
