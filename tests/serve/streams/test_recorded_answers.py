"""Answers as recordings, and what is damaged in those of pictures; rosbags writes and reads them, too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp import Pipeline
from vtp.engines import VtpError
from vtp.serve.robots.cdr import string_message
from vtp.serve.streams.cli import main
from vtp.serve.streams.sources.recording import RecordingSource
from vtp.serve.streams.watcher import Watcher

from ...conftest import Made

mcap_writer = pytest.importorskip("mcap.writer", reason="mcap is not installed")
rosbag2 = pytest.importorskip("rosbags.rosbag2", reason="rosbags is not installed")
typesys = pytest.importorskip("rosbags.typesys")
highlevel = pytest.importorskip("rosbags.highlevel")

STORE = typesys.get_typestore(typesys.Stores.ROS2_HUMBLE)
IMAGE, COMPRESSED, STRING = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage", "std_msgs/msg/String"
START, GAP = 1_000_000_000_000, 10_000_000  # nanoseconds
COUNT = 6


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def header(number: int, stamped: bool = True) -> Any:
    seconds, rest = divmod(START + number * GAP - 5, 10**9) if stamped else (0, 0)
    return STORE.types["std_msgs/msg/Header"](
        STORE.types["builtin_interfaces/msg/Time"](seconds, rest), "eye"
    )


def raw(number: int) -> Any:
    return STORE.types[IMAGE](header(number), 24, 32, "bgr8", 0, 96, pixels(number)[..., ::-1].ravel())


def png(number: int) -> Any:
    file = BytesIO()
    Image.fromarray(pixels(number)).save(file, "PNG")
    return STORE.types[COMPRESSED](header(number, False), "png", np.frombuffer(file.getvalue(), np.uint8))


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What rosbag2 would record: a topic of raw pictures, one of PNG, one of text."""
    folder = tmp_path_factory.mktemp("recorded") / "bag"
    writer = rosbag2.Writer(folder, version=9, storage_plugin=rosbag2.StoragePlugin.MCAP)
    writer.set_compression(rosbag2.CompressionMode.STORAGE, rosbag2.CompressionFormat.ZSTD)
    with writer:
        topics = {
            kind: writer.add_connection(topic, kind, typestore=STORE)
            for topic, kind in (("/eye/raw", IMAGE), ("/eye/png", COMPRESSED), ("/said", STRING))
        }
        for number in range(COUNT):
            for message in (raw(number), png(number), STORE.types[STRING](f"said {number}")):
                kind = message.__msgtype__
                stamp = START + number * GAP
                writer.write(topics[kind], stamp, STORE.serialize_cdr(message, kind))
    (file,) = folder.glob("*.mcap")
    return file


def test_a_picture_without_a_stamp_has_the_logs(recording: Path) -> None:
    """PNG of a publisher that gives none; the raw ones are 5 ns older than their log."""
    for topic, late in (("/eye/raw", 5), ("/eye/png", 0)):
        frames = list(RecordingSource(recording, topic, every_frame=True))
        assert [frame.stamp_ns for frame in frames] == [
            START + number * GAP - late for number in range(COUNT)
        ]
        for number, frame in enumerate(frames):
            assert (np.asarray(frame.load()) == pixels(number)).all()


@pytest.fixture(scope="module")
def pipeline(exported: Callable[[str], Made]) -> Iterator[Pipeline]:
    with Pipeline.load(exported("vispruner").folder, "ort-cpu", threads=1) as opened:
        yield opened


def test_answers_are_recorded_beside_their_frames(
    exported: Callable[[str], Made], recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command; rosbags reads what it wrote."""
    made = tmp_path / "answers.mcap"
    words = [str(exported("vispruner").folder), f"mcap:{recording}#/eye/raw", "--prompt", "what is it ?"]
    flags = ["--every-frame", "--json", "--mcap", str(made), "--max-new-tokens", "4", "--engine", "ort-cpu"]
    assert main([*words, *flags]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with highlevel.AnyReader([made], default_typestore=STORE) as reader:
        told = [
            (connection.topic, stamp, reader.deserialize(data, connection.msgtype).data)
            for connection, stamp, data in reader.messages()
        ]
    texts = [(stamp, text) for topic, stamp, text in told if topic == "/vtp/answer"]
    assert texts == [(line["frame"]["stamp_ns"], line["text"]) for line in lines]
    assert len(texts) == COUNT
    records = [json.loads(text) for topic, _, text in told if topic == "/vtp/answer_json"]
    assert records == [{k: v for k, v in line.items() if k not in ("source", "engine")} for line in lines]
    assert main([*words, *flags]) == 2
    assert "is there already; give another file" in capsys.readouterr().err


# -- what is damaged -----------------------------------------------------------------------------------------


def record(path: Path, messages: list[Any], encoding: str = "cdr", finish: bool = True) -> Path:
    """By Foxglove's own writer; messages may be bytes."""
    with path.open("wb") as file:
        writer = mcap_writer.Writer(file, chunk_size=1)
        writer.start(profile="ros2")
        schema = writer.register_schema(IMAGE, "ros2msg", b"")
        channel = writer.register_channel("/eye", encoding, schema)
        for message in messages:
            data = message if isinstance(message, bytes) else bytes(STORE.serialize_cdr(message, IMAGE))
            writer.add_message(channel, START, data, START)
        if finish:
            writer.finish()
        else:
            writer.flush()
    return path


def test_a_damaged_message_is_told_and_left_out(pipeline: Pipeline, tmp_path: Path) -> None:
    whole = bytes(STORE.serialize_cdr(raw(1), IMAGE))
    told: list[str] = []
    file = record(tmp_path / "one.mcap", [raw(0), whole[:100], raw(2)])
    source = RecordingSource(file, None, every_frame=True)
    watcher = Watcher(pipeline, source, "what ?", every_frame=True, tell=told.append, max_new_tokens=1)
    assert [answer.frame.number for answer in watcher] == [0, 2]
    (line,) = told
    assert "frame 1" in line
    assert "cut off" in line


def test_a_damaged_chunk_ends_it(tmp_path: Path) -> None:
    """Checksums are compared: pixels that were changed would otherwise be asked about."""
    file = record(tmp_path / "damaged.mcap", [raw(0), raw(1)])
    damaged = bytearray(file.read_bytes())
    damaged[300:400] = bytes(100)
    file.write_bytes(damaged)
    with pytest.raises(VtpError, match="is not a whole MCAP file"):
        list(RecordingSource(file, None, every_frame=True))


@pytest.mark.parametrize("text", ["", "a cup", "three\nlines\n", "eine Tasse für 左", "x" * 70_000])
def test_text_is_what_rosbags_writes_and_reads(text: str) -> None:
    data = string_message(text)
    assert STORE.deserialize_cdr(data, STRING).data == text
    assert data == bytes(STORE.serialize_cdr(STORE.types[STRING](text), STRING))
