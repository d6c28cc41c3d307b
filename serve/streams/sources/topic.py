"""The pictures of a ROS 2 topic, as robots with rmw_zenoh send them; no ROS is needed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from functools import partial

from vtp.runtime.commands.console import whole_number
from vtp.serve.robots.cdr import COMPRESSED, IMAGE
from vtp.serve.robots.zenoh.keys import Node, QoS
from vtp.serve.robots.zenoh.network import ROUTER, Network, check_endpoint
from vtp.serve.streams.frames import Frame
from vtp.serve.streams.newest import PushedFrames
from vtp.serve.streams.sources.messages import frame_of
from vtp.serve.streams.sources.names import source_name

_QOS = QoS(depth=1, best_effort=True)


def read_address(text: str) -> tuple[str, str]:
    """The router and the full name of the topic of TOPIC or ENDPOINT#TOPIC. Raises UsageError."""
    endpoint, found, topic = text.rpartition("#")
    endpoint = endpoint if found else ROUTER
    check_endpoint(endpoint)
    return endpoint, _node().topic(topic)


class TopicSource:
    """Frames of one topic of sensor_msgs/Image or CompressedImage, of all its publishers.

    Stamps and names are those of the messages' headers (the time at which it came where a header has none).
    """

    def __init__(self, text: str) -> None:
        """Join the network, and subscribe.

        text  TOPIC, or ENDPOINT#TOPIC

        Raises UsageError for what is neither, VtpError if no router answers.
        """
        endpoint, topic = read_address(text)
        self.name = source_name(f"zenoh:{text}")
        self._frames, self._lock, self._count = PushedFrames(self.name), threading.Lock(), 0
        self._network = Network(_node(), endpoint)
        for kind in (IMAGE, COMPRESSED):
            self._network.subscribe(topic, kind, partial(self._come, kind), _QOS)

    def __iter__(self) -> Iterator[Frame]:
        """Wait for frames, the newest each time."""
        return iter(self._frames)

    def close(self) -> None:
        """End the iteration, and leave the network."""
        self._frames.close()
        self._network.close()

    def _come(self, kind: str, data: bytes) -> None:
        with self._lock:
            self._frames.put(frame_of(self._count, kind, data, time.time_ns()))
            self._count += 1


def _node() -> Node:
    return Node("vtp_watch", domain=whole_number("$ROS_DOMAIN_ID", os.environ.get("ROS_DOMAIN_ID") or "0"))
