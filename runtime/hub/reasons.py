"""What went wrong with the hub, as one line: whose fault it is, and what to do. No token is ever repeated."""

from __future__ import annotations

import errno
import re

from vtp.engines.errors import VtpError, shown
from vtp.runtime.hub.names import HubName
from vtp.runtime.shell import command_line

_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet")
_TOKEN = re.compile(r"hf_[A-Za-z0-9_-]{20,}|(?i:bearer)\s+\S+")
_QUERY = re.compile(r"[?]\S+")
_LOGIN = "log in with hf auth login, or set HF_TOKEN"


class Unreached(VtpError):
    """The hub did not answer: what is in its cache may still do. `why` is what the library said."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


def explained(error: Exception, name: HubName, endpoint: str, sending: bool = False) -> VtpError:
    """One line about an error of the hub's library, while something is fetched or, with `sending`, pushed.

    The library's classes are told by their names, so that nothing is imported here.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"{endpoint}/{name.repo}"
    if "GatedRepoError" in kinds:
        return VtpError(f"{name.repo} is gated: ask for access at {page}, then {_LOGIN}")
    if "RepositoryNotFoundError" in kinds:
        lead = "" if sending else "no such folder, and "
        return VtpError(
            f"{lead}nothing on the hub that you may read: {name.repo}; check the name, and if it is private, "
            f"{_LOGIN}"
        )
    if "RevisionNotFoundError" in kinds:
        return VtpError(f"{name.repo} has no revision '{name.revision}'; {page}/tree/main lists them")
    if "UnicodeEncodeError" in kinds:
        return VtpError(f"the token for {name.repo} has a character that no token has: {_LOGIN}")
    if status == 401:
        return VtpError(f"the hub does not accept the token it was given for {name.repo}: {_LOGIN}")
    if status == 403:
        return VtpError(
            f"the hub forbids this of {name.repo}: {_short(error)}; check what the token may do, or {_LOGIN}"
        )
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _says_full(error):
        return VtpError(f"the disk is full while {name} is fetched; free some space, or set HF_HOME")
    if sending:
        return VtpError(
            f"the hub did not take {name.repo}: {_short(error)}; check the network, and try again"
        )
    if "OfflineModeIsEnabled" in kinds or _unreached(error, status):
        return Unreached(
            f"no such folder, and the hub was not reached: {name} ({_short(error)}); check the network, or "
            f"if it is a model, make a bundle of it with: "
            f"{command_line('vtp-export', '--model', name.repo, '-o', f'{name.name}-bundle')}",
            _short(error),
        )
    return VtpError(f"the hub did not give {name}: {_short(error)}")


def _unreached(error: Exception, status: int | None) -> bool:
    if status is not None:
        return status == 429 or status >= 500
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__name__ == "JSONDecodeError":
        return True
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & set(_NETWORK)) or type(error).__name__ == "LocalEntryNotFoundError"


def _says_full(error: Exception) -> bool:
    return "No space left on device" in str(error)


def _short(error: Exception) -> str:
    """The first line of what the library said, without tokens, and without queries of addresses."""
    if type(error).__name__ == "JSONDecodeError":
        return "what answered sends no JSON, so it is not the hub; a proxy or a login page may be between"
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = _TOKEN.sub("(token)", " ".join("".join(lines[:1]).split()))
    return f"{type(error).__name__}: {shown(_QUERY.sub('', text), 160)}"
