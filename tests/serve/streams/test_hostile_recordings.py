"""MCAP files that lie about their sizes, their order and their end, beside what the package mcap reads."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.engines import UsageError, VtpError
from vtp.serve.robots.cdr import IMAGE
from vtp.serve.streams.sources import chunks, pacing
from vtp.serve.streams.sources.recording import RecordingSource

mcap_writer = pytest.importorskip("mcap.writer", reason="mcap (extra [mcap]) is not installed")
mcap_reader = pytest.importorskip("mcap.reader")
records = pytest.importorskip("mcap.records")
stream = pytest.importorskip("mcap.data_stream")
zstandard = pytest.importorskip("zstandard")
lz4 = pytest.importorskip("lz4.frame")

KINDS = mcap_writer.CompressionType
SECOND = 10**9


def image(value: int, width: int = 6, height: int = 4) -> bytes:
    """sensor_msgs/Image in plain CDR, little endian: mono8 without a stamp, in the frame "cam"."""
    head = struct.pack("<iII4s", 0, 0, 4, b"cam\0") + struct.pack("<III6s", height, width, 6, b"mono8\0")
    rest = struct.pack("<II", width, width * height) + bytes([value]) * (width * height)
    return b"\0\1\0\0" + head + b"\0" + b"\0" + rest


def write(
    path: Path,
    messages: Sequence[tuple[int, bytes]],
    compression: Any = KINDS.ZSTD,
    kind: str = IMAGE,
    end: bool = True,
    **more: Any,
) -> Path:
    """Messages of one topic, /cam, each with its log time."""
    with path.open("wb") as file:
        out = mcap_writer.Writer(file, compression=compression, **more)
        out.start("ros2", "a test")
        channel = out.register_channel("/cam", "cdr", out.register_schema(kind, "ros2msg", b""))
        for when, data in messages:
            out.add_message(channel, when, data, when)
        if end:
            out.finish()
    return path


def with_chunk(path: Path, **changes: Any) -> Path:
    """A recording whose one chunk is changed; offsets behind it are moved."""
    data = write(path, [(0, image(1))], KINDS.NONE).read_bytes()
    start = 8
    while data[start] != 6:
        start += 9 + struct.unpack_from("<Q", data, start + 1)[0]
    end = start + 9 + struct.unpack_from("<Q", data, start + 1)[0]
    chunk = records.Chunk.read(stream.ReadDataStream(_after_head(data[start:end])))
    for name, value in changes.items():
        setattr(chunk, name, value)
    builder = stream.RecordBuilder()
    chunk.write(builder)
    new = builder.end()
    changed = bytearray(data[:start] + new + data[end:])
    moved, footer = len(new) - (end - start), len(changed) - 28
    summary, offsets, _ = struct.unpack_from("<QQI", changed, footer)
    struct.pack_into("<QQI", changed, footer, summary + moved, offsets + moved, 0)
    path.write_bytes(changed)
    return path


def _after_head(record: bytes) -> io.BytesIO:
    return io.BytesIO(record[9:])


def values(path: Path, **more: Any) -> list[int]:
    """The grey of each frame."""
    source = RecordingSource(path, None, every_frame=True, **more)
    return [int(np.asarray(frame.load())[0, 0, 0]) for frame in source]


def refusal(path: Path) -> str:
    with pytest.raises(VtpError) as caught:
        values(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", list(KINDS))
def test_messages_come_in_the_order_in_which_mcap_gives_them(tmp_path: Path, compression: Any) -> None:
    """Chunks that overlap in time, and messages that were logged late."""
    times = np.random.default_rng(0).integers(0, 40, 60).tolist()
    given = [(when * SECOND, image(number)) for number, when in enumerate(times)]
    path = write(tmp_path / "mixed.mcap", given, compression, chunk_size=400)
    with path.open("rb") as file:
        reader = mcap_reader.SeekingReader(file)
        assert len(reader.get_summary().chunk_indexes) > 5
        right = [message.data for _, _, message in reader.iter_messages(["/cam"])]
    order = [next(number for number, (_, data) in enumerate(given) if data == one) for one in right]
    assert values(path) == order
    assert sorted(order) == list(range(60))


def test_without_chunks_messages_come_as_they_lie_in_the_file(tmp_path: Path) -> None:
    given = [(when * SECOND, image(when)) for when in (3, 1, 2)]
    assert values(write(tmp_path / "plain.mcap", given, use_chunking=False)) == [3, 1, 2]


def test_without_an_index_chunks_are_read_one_after_the_other(tmp_path: Path) -> None:
    given = [(when * SECOND, image(when)) for when in (3, 1, 2)]
    index = mcap_writer.IndexType.NONE
    assert values(write(tmp_path / "bare.mcap", given, index_types=index)) == [1, 2, 3]


# -- lies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("says", [1000, 2**29, 2**40])
def test_a_bomb_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, says: int
) -> None:
    """64 MB of zeros in some KB: never more than the chunk says, and the limit, is made of it."""
    monkeypatch.setattr(chunks, "_LARGEST_CHUNK", 2**20)
    zeros, made = bytes(2**26), list[int]()
    packed = zstandard.compress(zeros) if compression == "zstd" else lz4.compress(zeros)
    for name, unpack in list(chunks._UNPACKING.items()):

        def measured(data: bytes, size: int, unpack: Any = unpack) -> bytes:
            out: bytes = unpack(data, size)
            made.append(len(out))
            return out

        monkeypatch.setitem(chunks._UNPACKING, name, measured)
    path = with_chunk(
        tmp_path / "bomb.mcap",
        compression=compression,
        data=packed,
        uncompressed_size=says,
        uncompressed_crc=0,
    )
    line = refusal(path)
    assert "is not a whole MCAP file: a chunk " in line
    assert made == ([1001] if says == 1000 else [])
    assert ("has another size than it says" in line) is (says == 1000)
    assert ("at most 1,048,576 are read" in line) is (says > 1000)


def test_zeros_are_no_records(tmp_path: Path) -> None:
    zeros = bytes(9 * 1000)
    path = with_chunk(tmp_path / "zeros.mcap", data=zeros, uncompressed_size=9000, uncompressed_crc=0)
    assert "a chunk holds records that cannot be" in refusal(path)


def test_a_record_that_is_longer_than_its_chunk_is_refused(tmp_path: Path) -> None:
    data = struct.pack("<BQ", 5, 2**63) + bytes(50)
    path = with_chunk(tmp_path / "long.mcap", data=data, uncompressed_size=59, uncompressed_crc=0)
    assert "a chunk holds records that cannot be" in refusal(path)


def test_a_wrong_checksum_and_an_unknown_compression_are_named(tmp_path: Path) -> None:
    right = with_chunk(tmp_path / "right.mcap")
    assert values(right) == [1]
    wrong = with_chunk(tmp_path / "wrong.mcap", uncompressed_crc=zlib.crc32(b"other"))
    assert "the checksum of a chunk is wrong" in refusal(wrong)
    other = with_chunk(tmp_path / "other.mcap", compression="br\x1b")
    assert r"a chunk is compressed by 'br\x1b'; zstd, lz4 and none are read" in refusal(other)


def test_chunks_that_overlap_in_time_are_not_all_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [(1000 * (number % 2), image(number, 100, 100)) for number in range(16)]
    path = write(tmp_path / "once.mcap", given, chunk_size=15_000)
    assert values(path) == [*range(0, 16, 2), *range(1, 16, 2)]
    monkeypatch.setattr(chunks, "LARGEST", 30_000)
    assert "too many of its chunks overlap in time" in refusal(path)


def test_of_a_topic_with_two_types_the_pictures_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "two.mcap"
    with path.open("wb") as file:
        out = mcap_writer.Writer(file)
        out.start("ros2", "a test")
        for kind in (IMAGE, "std_msgs/msg/String"):
            channel = out.register_channel("/cam", "cdr", out.register_schema(kind, "ros2msg", b""))
            out.add_message(channel, 1, image(9), 1)
        out.finish()
    assert values(path) == [9]


# -- what is said --------------------------------------------------------------------------------------------


def test_a_recording_that_was_not_finished_says_how_to_mend_it(tmp_path: Path) -> None:
    given = [(number, image(number)) for number in range(50)]
    cure = "it was not finished, or is cut off; `mcap recover` makes a whole recording of what it has"
    assert cure in refusal(write(tmp_path / "killed.mcap", given, chunk_size=200, end=False))
    whole = write(tmp_path / "whole.mcap", given, chunk_size=200).read_bytes()
    for size in (9, 30, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.mcap").write_bytes(whole[:size])
        assert cure in refusal(tmp_path / "cut.mcap")
    (tmp_path / "empty.mcap").write_bytes(b"")
    assert "is not a whole MCAP file: EndOfFile" in refusal(tmp_path / "empty.mcap")


def test_a_topic_without_a_message_is_an_error_as_a_video_without_a_frame_is(tmp_path: Path) -> None:
    assert "#/cam gave no picture: nothing was recorded" in refusal(write(tmp_path / "none.mcap", []))


def test_a_recording_without_pictures_says_what_it_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "text.mcap", [(0, b"")], kind="std_msgs/msg/String")
    with pytest.raises(
        UsageError, match=r"text\.mcap has no pictures: it holds std_msgs/msg/String, and sensor"
    ):
        RecordingSource(path, None)


def test_a_long_wait_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first message with the log time 0, as of a robot whose clock was not set yet."""
    told: list[str] = []
    path = write(tmp_path / "gap.mcap", [(0, image(1)), (1_700_000_000 * SECOND, image(2))])
    source = RecordingSource(path, None, tell=lambda line: (told.append(line), source.close())[0])
    assert len(list(source)) == 1
    assert told == [
        f"the next frame of mcap:{path}#/cam is 1.7e+09 s after the one before, and is waited for; "
        "--every-frame waits for none"
    ]
    assert pacing._LONG_GAP == 60
