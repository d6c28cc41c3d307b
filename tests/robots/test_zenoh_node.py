"""The node on a real bundle, without zenoh: its messages are read and written by rosbags."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from rosbags.typesys import Stores, get_typestore

from vtp import Pipeline
from vtp.engines import VtpError
from vtp.runtime.decisions.decision import Decision
from vtp.runtime.result import Timings, VisualTokens
from vtp.serve.robots.cdr import BOOL, IMAGE, STRING
from vtp.serve.robots.model import Model
from vtp.serve.robots.settings import Settings
from vtp.serve.robots.zenoh import node as zenoh_node
from vtp.serve.robots.zenoh.keys import Node, QoS
from vtp.serve.robots.zenoh.node import ZenohRobot

from ..conftest import Made

STORE = get_typestore(Stores.ROS2_JAZZY)
TYPES: Any = STORE.types
PATIENCE = 30.0
ASKING = Settings(prompt="what is it ?", max_tokens=4, rate=1000.0, alert="is it ?", stale_after=0.2)


@dataclass
class Carrier:
    """In place of a `Network`: what was published, and who subscribed."""

    node: Node = field(default_factory=lambda: Node("eye", "/front"))
    endpoint: str = "tcp/nowhere:7447"
    connected: bool = True
    broken: bool = False
    closed: bool = False
    published: list[tuple[str, str, bytes]] = field(default_factory=list)
    subscribed: dict[str, tuple[str, Callable[[bytes], None], QoS]] = field(default_factory=dict)

    def publisher(self, topic: str, kind: str) -> Any:
        carrier = self

        class Publisher:
            def publish(self, message: bytes) -> None:
                if carrier.broken:
                    raise VtpError("zenoh did not send a message: it broke")
                carrier.published.append((topic, kind, message))

        return Publisher()

    def subscribe(self, topic: str, kind: str, come: Callable[[bytes], None], qos: QoS) -> None:
        self.subscribed[topic] = (kind, come, qos)

    def is_connected(self) -> bool:
        return self.connected

    def close(self) -> None:
        self.closed = True

    def send(self, topic: str, data: bytes) -> None:
        self.subscribed[topic][1](data)

    def came(self, topic: str, count: int) -> list[Any]:
        """Wait for so many messages of a topic, read by rosbags."""

        def found() -> list[Any]:
            of_topic = [one for one in list(self.published) if one[0] == topic]
            return [STORE.deserialize_cdr(data, kind).data for _, kind, data in of_topic]

        until(lambda: len(found()) >= count)
        return found()


class Deciding(Model):
    """A model whose words have a yes and a no, which those of the tests lack."""

    def decide(self, picture: np.ndarray, settings: Settings) -> Decision:
        yes = float(picture[0, 0, 0] < 128)
        shares = {"yes": yes, "no": 1 - yes}
        return Decision("yes_no", shares, "yes", None, 1.0, VisualTokens(9, 4), [], 7, Timings(total=1.0))

    def check(self, settings: Settings) -> None:
        super().check(replace(settings, alert=""))


def until(met: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def pipeline(exported: Callable[[str], Made]) -> Iterator[Pipeline]:
    with Pipeline.load(exported("vispruner").folder, "ort-cpu", threads=1) as opened:
        yield opened


@pytest.fixture
def carrier() -> Carrier:
    return Carrier()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def robot(
    pipeline: Pipeline, carrier: Carrier, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ZenohRobot]:
    monkeypatch.setattr(zenoh_node, "_EVERY", 0.01)
    network: Any = carrier
    made = ZenohRobot(network, Deciding(pipeline), ASKING, "camera/image", lines.append)
    yield made
    if not carrier.closed:
        made.close()


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)


def image(seed: int, **changed: Any) -> bytes:
    stamp = TYPES["builtin_interfaces/msg/Time"](1_700_000_000 + seed, 5)
    header = TYPES["std_msgs/msg/Header"](stamp, f"eye_{seed}")
    fields = {"height": 24, "width": 24, "encoding": "rgb8", "step": 72, **changed}
    message = TYPES[IMAGE](header, is_bigendian=0, data=pixels(seed).ravel(), **fields)
    return bytes(STORE.serialize_cdr(message, IMAGE))


def prompt(text: str) -> bytes:
    return bytes(STORE.serialize_cdr(TYPES[STRING](text), STRING))


def test_an_answer_is_the_pipelines_with_the_frames_stamp(
    robot: ZenohRobot, carrier: Carrier, pipeline: Pipeline
) -> None:
    kind, _, qos = carrier.subscribed["/front/camera/image"]
    assert (kind, qos) == (IMAGE, QoS(depth=1, best_effort=True))
    carrier.send("/front/camera/image", image(3))
    (told,) = carrier.came("/front/eye/answer_json", 1)
    said = json.loads(told)
    assert said["stamp"] == {"sec": 1_700_000_003, "nanosec": 5}
    assert (said["frame_id"], said["number"], said["prompt"]) == ("eye_3", 0, "what is it ?")
    wanted = pipeline.generate(pixels(3), "what is it ?", max_new_tokens=4)
    assert carrier.came("/front/eye/answer", 1) == [said["text"]] == [wanted.text]


def test_an_alert_is_a_bool_for_each_frame(robot: ZenohRobot, carrier: Carrier) -> None:
    for number in range(6):
        carrier.send("/front/camera/image", image(number))
        carrier.came("/front/eye/alert", number + 1)
    wanted = [bool(pixels(number)[0, 0, 0] < 128) for number in range(6)]
    assert carrier.came("/front/eye/alert", 6) == wanted
    assert set(wanted) == {True, False}
    assert {kind for topic, kind, _ in carrier.published if topic.endswith("alert")} == {BOOL}


def test_another_question_holds_from_the_next_frame_and_a_bad_one_changes_nothing(
    robot: ZenohRobot, carrier: Carrier, lines: list[str]
) -> None:
    for data in (prompt("x" * 70_000), b"", prompt("y")[:7], prompt("z")[:5] + b"\xff\xff\xff"):
        carrier.send("/front/eye/prompt", data)
    assert len(lines) == 5
    assert all(line.startswith("the prompt stays as it was: ") for line in lines[1:])
    carrier.send("/front/eye/prompt", prompt("how many ?"))
    carrier.send("/front/camera/image", image(1))
    assert json.loads(carrier.came("/front/eye/answer_json", 1)[0])["prompt"] == "how many ?"
    assert len(lines) == 5


BAD = {
    "nothing": (b"", "a message is not in plain CDR"),
    "short": (image(0)[:100], "a message is cut off"),
    "step": (image(0, step=5), "an image says step 5"),
    "encoding": (image(0, encoding="bayer_rggb8"), "images of encoding 'bayer_rggb8' are not served"),
    "huge": (image(0, height=2**32 - 1, width=2**32 - 1), "at most 89,478,485 are taken"),
    "length": (image(0, height=23), "an image has 1728 bytes of data"),
}


def test_a_message_that_is_damaged_is_a_line_and_is_counted(
    robot: ZenohRobot, carrier: Carrier, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zenoh_node, "_QUIET", -1.0)  # each of them
    for count, (data, words) in enumerate(BAD.values(), 1):
        carrier.send("/front/camera/image", data)
        until(lambda count=count: len(lines) == count + 1)
        assert lines[-1].startswith("a frame was not answered: ")
        assert words in lines[-1]
    monkeypatch.setattr(zenoh_node, "_QUIET", 60.0)
    for _ in range(50):  # of a flood, none
        carrier.send("/front/camera/image", b"")
    carrier.send("/front/camera/image", image(1))
    assert len(carrier.came("/front/eye/answer", 1)) == 1
    assert len(lines) == len(BAD) + 1
    robot.close()
    assert lines[-1].endswith(f", 1 answers, {len(BAD) + 50} dropped, {len(BAD) + 50} failures")


def test_what_cannot_be_sent_is_told_and_ends_nothing(
    robot: ZenohRobot, carrier: Carrier, lines: list[str]
) -> None:
    carrier.broken = True
    carrier.send("/front/camera/image", image(0))
    until(lambda: len(lines) == 2)
    assert lines[1] == "a frame was not answered: zenoh did not send a message: it broke"
    carrier.broken = False
    carrier.send("/front/camera/image", image(1))
    carrier.came("/front/eye/answer", 1)


def test_it_tells_when_the_router_and_the_camera_are_lost_and_back(
    robot: ZenohRobot, carrier: Carrier, lines: list[str]
) -> None:
    stopped = threading.Event()
    watching = threading.Thread(target=robot.watch, args=(stopped,))
    watching.start()
    try:
        until(lambda: any(line.startswith("no frame has come on /front/camera/image") for line in lines))
        carrier.connected = False
        until(lambda: lines[-1] == "lost the router at tcp/nowhere:7447; trying again")
        carrier.connected = True
        until(lambda: lines[-1] == "the router at tcp/nowhere:7447 is back")
    finally:
        stopped.set()
        watching.join()


def test_its_end_is_told_and_leaves_no_thread(robot: ZenohRobot, carrier: Carrier, lines: list[str]) -> None:
    carrier.send("/front/camera/image", image(0))
    carrier.came("/front/eye/answer", 1)
    robot.close()
    assert carrier.closed
    assert lines == ["asking about /front/camera/image", "1 frames, 1 answers, 0 dropped, 0 failures"]
    assert not [one for one in threading.enumerate() if one.name == "vtp-asker"]
    carrier.send("/front/camera/image", image(1))  # one that was on its way
