"""How rmw_zenoh writes ROS 2 on zenoh: keys of topics, tokens of nodes, what is attached to each message.

Knows no zenoh. Written from rmw_zenoh's docs/design.md and its `liveliness_utils.cpp` and
`attachment_helpers.cpp`, of the versions since 0.2.4 (April 2025).
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass

from vtp.engines import UsageError
from vtp.engines.errors import quoted_argument
from vtp.serve.robots.cdr import BOOL, COMPRESSED, IMAGE, STRING

__all__ = [
    "HASHES",
    "PUBLISHES",
    "SUBSCRIBES",
    "Node",
    "QoS",
    "attachment",
    "check_name",
    "gid_of",
]

#: Types of messages and the hashes of their definitions (RIHS01), the same from Iron to Kilted.
HASHES = {
    IMAGE: "RIHS01_d31d41a9a4c4bc8eae9be757b0beed306564f7526c88ea6a4588fb9582527d47",
    COMPRESSED: "RIHS01_15640771531571185e2efc8a100baf923961a4d15d5569652e6cb6691e8e371a",
    STRING: "RIHS01_df668c740482bbd48fb39d76a70dfd4bd59db1288021743503259e948f6b1a18",
    BOOL: "RIHS01_feb91e995ff9ebd09c0cb3d2aed18b11077585839fb5db80193b62d74528f6c9",
}
_UNHASHED = "TypeHashNotSupported"  # Humble's messages have no hashes
_TOKENS = "@ros2_lv"
_NODE, PUBLISHES, SUBSCRIBES = "NN", "MP", "MS"  # kinds of entities
_NO_ENCLAVE = "%"
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LARGEST_DOMAIN = 2**32 - 1


@dataclass(frozen=True)
class QoS:
    """What a token tells of an endpoint's quality of service; volatile, keep last."""

    depth: int = 10
    best_effort: bool = False

    def text(self) -> str:
        """As tokens have it: fields with rmw_zenoh's default (reliable, volatile, keep last) are empty."""
        return f"{2 if self.best_effort else ''}::,{self.depth}:,:,:,,"


@dataclass(frozen=True)
class Node:
    """A ROS node's names.

    domain  ROS_DOMAIN_ID
    hashed  whether types have hashes: not on Humble
    """

    name: str = "vtp"
    namespace: str = "/"
    domain: int = 0
    hashed: bool = True

    def __post_init__(self) -> None:
        """Raise UsageError for names that ROS does not allow."""
        check_name("node", self.name, self.name)
        object.__setattr__(self, "namespace", f"/{self.namespace.strip('/')}")
        if self.namespace != "/":
            check_name("namespace", self.namespace, *self.namespace[1:].split("/"))
        if not 0 <= self.domain <= _LARGEST_DOMAIN:
            raise UsageError(f"domain {self.domain} is not allowed; give 0 to {_LARGEST_DOMAIN}")

    def topic(self, name: str) -> str:
        """The full name of a topic: `~/answer` belongs to the node, `image` to its namespace, `/image` to
        nobody. Raises UsageError for names that ROS does not allow."""
        words = name.removeprefix("~/") if name.startswith("~/") else name.removeprefix("/")
        check_name("topic", name, *words.split("/"))
        if name.startswith("/"):
            return name
        inside = f"{self.namespace.rstrip('/')}/"
        return f"{inside}{self.name}/{words}" if name.startswith("~/") else f"{inside}{words}"

    def key(self, topic: str, kind: str) -> str:
        """The key under which the messages of a topic, by its full name, travel."""
        return f"{self.domain}/{topic.lstrip('/')}/{_dds(kind)}/{self._hash(kind)}"

    def token(self, session: str) -> str:
        """What says that the node is there.

        session  the zenoh session's identifier
        """
        return self._token(session, 0, _NODE)

    def endpoint_token(self, session: str, number: int, role: str, topic: str, kind: str, qos: QoS) -> str:
        """What says that a publisher or subscription is there.

        number  counts the node's endpoints, from 1
        role    `PUBLISHES` or `SUBSCRIBES`
        """
        told = (_mangled(topic), _dds(kind), self._hash(kind), qos.text())
        return "/".join((self._token(session, number, role), *told))

    def _token(self, session: str, number: int, role: str) -> str:
        names = (_NO_ENCLAVE, _mangled(self.namespace), self.name)
        return "/".join((_TOKENS, str(self.domain), session, "0", str(number), role, *names))

    def _hash(self, kind: str) -> str:
        return HASHES[kind] if self.hashed else _UNHASHED


def check_name(what: str, name: str, *words: str) -> None:
    """Raise UsageError unless each word is letters, digits and underscores, and begins with no digit."""
    if not all(_WORD.fullmatch(word) for word in words):
        raise UsageError(
            f"{what} {quoted_argument(name)} is not a name of ROS; give letters, digits and _, beginning "
            f"with no digit{'' if what == 'node' else ', with / between words'}"
        )


def attachment(sequence: int, stamp_ns: int, gid: bytes) -> bytes:
    """What accompanies a message: its number, when it was sent, and its publisher's GID of 16 bytes."""
    return struct.pack("<qqB", sequence, stamp_ns, len(gid)) + gid


def gid_of(token: str) -> bytes:
    """16 bytes that are a publisher's own, from its token: BLAKE2, where rmw_zenoh takes XXH3.

    They tell publishers apart; `ros2 topic info -v` shows the GID that its own rmw_zenoh makes of the token.
    """
    return hashlib.blake2b(token.encode(), digest_size=16).digest()


def _mangled(name: str) -> str:
    return name.replace("/", "%")


def _dds(kind: str) -> str:
    """A type's name as DDS has it: std_msgs/msg/String is std_msgs::msg::dds_::String_."""
    package, interface, name = kind.split("/")
    return f"{package}::{interface}::dds_::{name}_"
