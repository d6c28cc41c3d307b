"""Reaching a Ray cluster, or starting one on this machine (the extra `ray`)."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Callable
from typing import Any

from vtp.engines.errors import UsageError, VtpError, shown

LOCAL, ANY = "local", "auto"
_REACH = 5.0  # seconds for a cluster to take a connection: Ray itself tries for minutes


def set_ray_environment(address: str) -> None:
    """What Ray reads when it is imported: it reports nothing, and a local cluster asks for a token.

    A local cluster's ports are open to other machines: nothing is done there without a token, which is made
    for this run and which nobody else knows. Raises UsageError where tokens were switched off.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address != LOCAL:
        return
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise UsageError("--ray local is not started without a token; unset RAY_AUTH_MODE")
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)


def check_reachable(address: str) -> None:
    """Refuse HOST:PORT at which nothing listens; Ray would try for minutes, and say so many times.

    Raises UsageError for what is neither "local", "auto" nor HOST:PORT, VtpError where nothing listens.
    """
    if address in (LOCAL, ANY):
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        raise UsageError(
            f"--ray {shown(address)} is not a valid address; run this on a machine of the cluster and give "
            f"HOST:PORT of its head, {ANY} or {LOCAL}"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_REACH).close()
    except (OSError, OverflowError) as error:
        raise VtpError(
            f"no Ray cluster answers at --ray {shown(address)} ({error}); start one with: ray start --head, "
            f"or give --ray {LOCAL}"
        ) from error


def connect(init: Callable[..., Any], shutdown: Callable[[], Any], address: str, **options: Any) -> None:
    """`ray.init` at `address`, with workers that import nothing from the folder that we are in.

    A local cluster's processes end with the thread that calls this. Raises VtpError, in one line.
    """
    own = {"include_dashboard": False} if address == LOCAL else {}
    with tempfile.TemporaryDirectory(prefix="vtp-ray-") as empty:
        # The workers' folder: otherwise Ray would let them import from the current one.
        env = {"working_dir": empty}
        try:
            init(address, logging_level="ERROR", runtime_env=env, **own, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            shutdown()
            reason = shown(" ".join(str(error).split()), 200)
            what = "Ray does not start" if address == LOCAL else "no Ray cluster answers"
            raise VtpError(f"{what} at --ray {address}: {reason}") from error
