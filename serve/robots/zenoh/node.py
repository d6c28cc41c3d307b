"""The node: from messages in CDR to an `Asker` that knows neither ROS nor zenoh, and from it to topics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from vtp.engines import VtpError
from vtp.engines.errors import shown
from vtp.serve.robots.answers import Answer, Received
from vtp.serve.robots.asker import Asker
from vtp.serve.robots.cdr import (
    BOOL,
    COMPRESSED,
    IMAGE,
    STRING,
    bool_message,
    read_message,
    read_string,
    string_message,
)
from vtp.serve.robots.health import Health, Level
from vtp.serve.robots.model import Model
from vtp.serve.robots.settings import COMPRESSED as COMPRESSED_IMAGES
from vtp.serve.robots.settings import Phase, Settings, changed
from vtp.serve.robots.zenoh.keys import QoS
from vtp.serve.robots.zenoh.network import Network

__all__ = ["ZenohRobot", "image_topic"]

_EVERY = 1.0  # seconds between two looks at how it does
_QUIET = 5.0  # seconds between two lines about messages that fail


class ZenohRobot:
    """Asks about the pictures of a topic, and publishes the answers, from its making to `close`.

    health  counts what came, was answered and failed
    """

    def __init__(
        self, network: Network, model: Model, settings: Settings, topic: str, tell: Callable[[str], None]
    ) -> None:
        """Publish, subscribe and begin.

        topic  the pictures' topic, as `Node.topic` takes it, without the /compressed of compressed ones
        tell   called with a line about what fails, and about what is over
        """
        self.health = Health()
        self._network, self._model, self._settings, self._tell = network, model, settings, tell
        self._lock = threading.Lock()  # for settings, and for what was told
        self._failure, self._told_at, self._untold = "", -_QUIET, 0
        self._level, self._connected = Level.OK, True
        self._count = 0
        node = network.node
        self._answers = network.publisher(node.topic("~/answer"), STRING)
        self._json = network.publisher(node.topic("~/answer_json"), STRING)
        self._alerts = network.publisher(node.topic("~/alert"), BOOL)
        self._asker = Asker(model, lambda: self._settings, time.time_ns, self._said, self._failed, tell)
        self._topic, self._kind = image_topic(node.topic(topic), settings)
        self.health.activated(time.time_ns(), self._topic)
        network.subscribe(node.topic("~/prompt"), STRING, self._on_prompt, QoS())
        network.subscribe(self._topic, self._kind, self._on_image, QoS(depth=1, best_effort=True))
        self._asker.start()
        tell(f"asking about {self._topic}")

    def watch(self, stopped: threading.Event) -> None:
        """Tell, until `stopped`, when the router is lost and when it is back, and when no frame comes."""
        while not stopped.wait(_EVERY):
            self._look()

    def close(self) -> None:
        """End the answer that is being written, leave the network, and tell what it came to."""
        self._asker.stop()
        self._network.close()
        figures = self.health.report(Phase.INACTIVE, time.time_ns(), 1.0).values
        self._tell(
            ", ".join(f"{figures[name]} {name}" for name in ("frames", "answers", "dropped", "failures"))
        )

    # -- messages, in zenoh's threads ------------------------------------------------------------------------

    def _on_image(self, data: bytes) -> None:
        """Hand a picture over; nothing is decoded here but its header."""
        number, self._count = self._count, self._count + 1
        try:
            message = read_message(self._kind, data)
        except VtpError as error:
            self._failed(f"message {number} of {self._topic}: {error}")
            return
        header = message.header
        received = Received(message, number, header.stamp_ns, header.frame_id, time.time_ns())
        self.health.received(received)
        self._asker.put(received)

    def _on_prompt(self, data: bytes) -> None:
        """Change the question, if the bundle takes the new one."""
        try:
            with self._lock:
                new = changed(self._settings, {"prompt": read_string(data)}, Phase.ACTIVE)
                self._model.check(new)
                self._settings = new
        except VtpError as error:
            self._tell(f"the prompt stays as it was: {error}")
        else:
            self._asker.poke()

    # -- answers, in the asker's thread ----------------------------------------------------------------------

    def _said(self, answer: Answer) -> None:
        self.health.said(answer)
        try:
            self._json.publish(string_message(answer.to_json()))
            if answer.result is not None:
                self._answers.publish(string_message(answer.text))
            if answer.alert is not None:
                self._alerts.publish(bool_message(answer.alert[2]))
        except (VtpError, ValueError) as error:
            self._failed(shown(error))

    def _failed(self, line: str) -> None:
        """Count it, and tell it unless one was told a moment ago."""
        self.health.failed(line)
        with self._lock:
            self._failure, self._untold = line, self._untold + 1
            if time.monotonic() - self._told_at < _QUIET:
                return
            more = f" ({self._untold} since the last line)" if self._untold > 1 else ""
            self._told_at, self._untold = time.monotonic(), 0
        self._tell(f"a frame was not answered: {line}{more}")

    # -- how it does -----------------------------------------------------------------------------------------

    def _look(self) -> None:
        if (connected := self._network.is_connected()) is not self._connected:
            self._connected = connected
            at = shown(self._network.endpoint)
            self._tell(
                f"the router at {at} is back" if connected else f"lost the router at {at}; trying again"
            )
        report = self.health.report(Phase.ACTIVE, time.time_ns(), self._settings.stale_after)
        if report.message != self._failure and report.level is not self._level:
            self._level = report.level
            self._tell(report.message)


def image_topic(topic: str, settings: Settings) -> tuple[str, str]:
    """The topic and type of pictures: as image_transport does, .../compressed lies beside the raw ones."""
    if settings.image_transport == COMPRESSED_IMAGES:
        return f"{topic}/compressed", COMPRESSED
    return topic, IMAGE
