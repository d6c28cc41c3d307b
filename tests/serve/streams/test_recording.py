"""MCAP recordings as sources: messages written by others' code (rosbags, mcap), and what is refused."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import VtpError
from vtp.serve.robots.cdr import COMPRESSED, IMAGE, read_message
from vtp.serve.streams.frames import ROS
from vtp.serve.streams.sources.opening import open_source
from vtp.serve.streams.sources.recording import RecordingSource

writer = pytest.importorskip("mcap.writer", reason="mcap (extra [mcap]) is not installed")
typesys = pytest.importorskip("rosbags.typesys", reason="rosbags is not installed")

STORE = typesys.get_typestore(typesys.Stores.ROS2_HUMBLE)
STEP = 50_000_000  # nanoseconds from frame to frame


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (30, 41, 3), dtype=np.uint8)


def header(number: int) -> Any:
    types = STORE.types
    stamp = types["builtin_interfaces/msg/Time"](1_700_000_000 + number, 123_456_789)
    return types["std_msgs/msg/Header"](stamp, "front camera")


def raw(number: int) -> bytes:
    """bgr8 with rows that are filled up, as drivers send it."""
    rows = np.zeros((30, 128), np.uint8)
    rows[:, :123] = picture(number)[:, :, ::-1].reshape(30, 123)
    message = STORE.types[IMAGE](header(number), 30, 41, "bgr8", 0, 128, rows.reshape(-1))
    return bytes(STORE.serialize_cdr(message, IMAGE))


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(number)).save(out, "PNG")
    message = STORE.types[COMPRESSED](header(number), "png", np.frombuffer(out.getvalue(), np.uint8))
    return bytes(STORE.serialize_cdr(message, COMPRESSED))


def text(number: int) -> bytes:
    kind = "std_msgs/msg/String"
    return bytes(STORE.serialize_cdr(STORE.types[kind](f"hello {number}"), kind))


TOPICS = {"/raw": (IMAGE, raw), "/png": (COMPRESSED, png), "/said": ("std_msgs/msg/String", text)}


def record(path: Path, topics: Any, count: int = 4, encoding: str = "cdr") -> Path:
    with path.open("wb") as file:
        out = writer.Writer(file)
        out.start()
        for topic in topics:
            kind, make = TOPICS[topic]
            schema = out.register_schema(kind, "ros2msg", b"")
            channel = out.register_channel(topic, encoding, schema)
            for number in range(count):
                when = 10**18 + number * STEP
                out.add_message(channel, when, make(number), when)
        out.finish()
    return path


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("bag") / "drive.mcap", TOPICS)


@pytest.mark.parametrize("topic", ["/raw", "/png"])
def test_frames_are_the_messages(bag: Path, topic: str) -> None:
    source = open_source(f"mcap:{bag}#{topic}", every_frame=True)
    frames = list(source)
    assert source.name == f"mcap:{bag}#{topic}"
    assert [(one.number, one.clock, one.name) for one in frames] == [
        (n, ROS, "front camera") for n in range(4)
    ]
    for number, one in enumerate(frames):
        assert one.stamp_ns == (1_700_000_000 + number) * 10**9 + 123_456_789
        np.testing.assert_array_equal(np.asarray(one.load()), picture(number))


def test_a_recording_is_played_as_it_came(bag: Path) -> None:
    began = time.monotonic()
    arrived = [one.arrived for one in RecordingSource(bag, "/raw")]
    assert len(arrived) == 4
    assert all(when - began >= place * STEP / 1e9 - 1e-3 for place, when in enumerate(arrived))


def test_the_only_topic_with_pictures_needs_no_name(tmp_path: Path) -> None:
    bag = record(tmp_path / "one.mcap", ["/said", "/png"])
    assert open_source(f"mcap:{bag}").name == f"mcap:{bag}#/png"


def test_big_endian_messages_are_read() -> None:
    message = STORE.types[IMAGE](header(5), 1, 2, "mono8", 0, 2, np.array([7, 9], np.uint8))
    data = bytes(STORE.serialize_cdr(message, IMAGE, little_endian=False))
    read: Any = read_message(IMAGE, data)
    assert (read.height, read.width, read.step, bytes(read.data)) == (1, 2, 2, b"\x07\x09")
    assert read.header.stamp_ns == 1_700_000_005_123_456_789


@pytest.mark.parametrize("kind", [IMAGE, COMPRESSED])
def test_messages_that_are_cut_off_are_refused(kind: str) -> None:
    whole = raw(0) if kind == IMAGE else png(0)
    for length in [*range(90), len(whole) - 1]:
        with pytest.raises(VtpError, match="a message is"):
            read_message(kind, whole[:length])


def test_what_cannot_be_played_is_refused(bag: Path, tmp_path: Path) -> None:
    def refusal(source: str) -> str:
        with pytest.raises(VtpError) as caught:
            list(open_source(source, every_frame=True))
        return str(caught.value)

    assert "name a topic" in refusal(f"mcap:{bag}") and "/png, /raw" in refusal(f"mcap:{bag}")
    assert "has no topic '/left'; its topics with pictures: /png, /raw" in refusal(f"mcap:{bag}#/left")
    assert "'/said' holds std_msgs/msg/String, and " in refusal(f"mcap:{bag}#/said")
    other = record(tmp_path / "other.mcap", ["/raw"], encoding="protobuf")
    assert "in protobuf" in refusal(f"mcap:{other}#/raw")
    assert "no such file" in refusal("mcap:absent.mcap#/raw").lower()
    noise = tmp_path / "noise.mcap"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    assert "is not a whole MCAP file" in refusal(f"mcap:{noise}#/raw")
    whole = bag.read_bytes()
    for share in (0.3, 0.6, 0.95):
        cut = tmp_path / "cut.mcap"
        cut.write_bytes(whole[: int(len(whole) * share)])
        assert "is not a whole MCAP file" in refusal(f"mcap:{cut}#/raw")
