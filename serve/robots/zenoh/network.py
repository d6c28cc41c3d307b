"""A zenoh session with one ROS node in it: its topics, and the tokens by which other nodes see it.

The only module that uses zenoh, and only inside its functions, so that it can be imported without it.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import quoted_argument, shown
from vtp.serve.robots.zenoh.keys import PUBLISHES, SUBSCRIBES, Node, QoS, attachment, gid_of

__all__ = ["ROUTER", "Network", "Publisher", "check_endpoint"]

ROUTER = "tcp/localhost:7447"  # where rmw_zenoh's router listens
_PROTOCOLS = ("tcp", "tls", "quic", "udp", "ws", "unixsock-stream", "serial")
_ENDPOINT = re.compile(rf"({'|'.join(_PROTOCOLS)})/[^\s#?]+([#?]\S*)?")
_CONNECTING = 5.0  # seconds
_WHERE = re.compile(r" at /\S+\.rs:\d+\.?")  # in zenoh's errors: the line of its source


class Network:
    """One node. Every method is safe from any thread."""

    def __init__(self, node: Node, endpoint: str = ROUTER) -> None:
        """Open a session, as rmw_zenoh's: a peer that knows the network from a router, without multicast.

        endpoint  the router's address, or any peer's

        Raises UsageError for what is not an address, VtpError without the library, or if nothing answers.
        """
        check_endpoint(endpoint)
        self.node, self.endpoint = node, endpoint
        self._zenoh = _load()
        self._session = _open(self._zenoh, endpoint)
        self._numbers = itertools.count(1)
        self._declared: list[Any] = []  # subscriptions and tokens end when nobody holds them
        self._id = str(self._session.zid())
        self._routed = bool(self._session.info.routers_zid())
        self._declare(node.token(self._id))

    def publisher(self, topic: str, kind: str) -> Publisher:
        """A reliable publisher of messages of type `kind`, whose topic has its full name."""
        token = self.node.endpoint_token(self._id, next(self._numbers), PUBLISHES, topic, kind, QoS())
        self._declare(token)
        declared = self._session.declare_publisher(
            self.node.key(topic, kind), encoding=self._zenoh.Encoding.APPLICATION_CDR
        )
        return Publisher(declared, gid_of(token))

    def subscribe(self, topic: str, kind: str, come: Callable[[bytes], None], qos: QoS) -> None:
        """Call `come` with the bytes of each message, in a thread of zenoh's; it must not raise."""

        def take(sample: Any) -> None:
            if sample.kind == self._zenoh.SampleKind.PUT:
                come(sample.payload.to_bytes())

        key = self.node.key(topic, kind)
        self._declared.append(self._session.declare_subscriber(key, take))
        self._declare(self.node.endpoint_token(self._id, next(self._numbers), SUBSCRIBES, topic, kind, qos))

    def is_connected(self) -> bool:
        """Whether the router is there, or a peer if there was no router; if not, zenoh goes on trying."""
        info = self._session.info
        return bool(info.routers_zid() if self._routed else info.peers_zid())

    def close(self) -> None:
        """Leave: tokens, subscriptions and publishers end."""
        self._session.close()

    def _declare(self, token: str) -> None:
        self._declared.append(self._session.liveliness().declare_token(token))


class Publisher:
    """Sends messages, each with what rmw_zenoh's subscriptions want to be attached."""

    def __init__(self, declared: Any, gid: bytes) -> None:
        self._declared, self._gid = declared, gid
        self._numbers, self._lock = itertools.count(1), threading.Lock()

    def publish(self, message: bytes) -> None:
        """Send a message in CDR. Raises VtpError if zenoh does not take it."""
        with self._lock:
            told = attachment(next(self._numbers), time.time_ns(), self._gid)
            try:
                self._declared.put(message, attachment=told)
            except Exception as error:  # zenoh has one kind of error
                raise VtpError(f"zenoh did not send a message: {_reason(error)}") from error


def check_endpoint(endpoint: str) -> None:
    """Raise UsageError unless it has the form of zenoh's addresses."""
    if not _ENDPOINT.fullmatch(endpoint):
        raise UsageError(
            f"{quoted_argument(endpoint)} is not an address of zenoh; give PROTOCOL/ADDRESS, such as "
            f"{ROUTER}; protocols: {', '.join(_PROTOCOLS)}"
        )


def _load() -> Any:
    try:
        import zenoh
    except ImportError:
        raise VtpError(
            "zenoh needs eclipse-zenoh, which is not installed; run: pip install 'vtp-edge[zenoh]'"
        ) from None
    return zenoh


def _open(zenoh: Any, endpoint: str) -> Any:
    """A session that is connected."""
    settings = {
        "mode": "peer",
        "connect/endpoints": [endpoint],
        "connect/timeout_ms": round(1e3 * _CONNECTING),
        "connect/exit_on_failure": True,
        "listen/endpoints": ["tcp/localhost:0"],  # other peers of this machine need no router in between
        "scouting/multicast/enabled": False,
    }
    config = zenoh.Config()
    try:
        for name, value in settings.items():
            config.insert_json5(name, json.dumps(value))
    except Exception as error:
        raise UsageError(f"zenoh does not take {quoted_argument(endpoint)}: {_reason(error)}") from error
    try:
        return zenoh.open(config)
    except Exception as error:
        if "Unable to connect" in str(error):
            raise VtpError(
                f"no zenoh router answers at {shown(endpoint)} (waited {_CONNECTING:g} s); start one (ros2 "
                "run rmw_zenoh_cpp rmw_zenohd, or zenohd), or give another address"
            ) from error
        raise VtpError(f"zenoh cannot start: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return shown(_WHERE.sub("", str(error)), 200)
