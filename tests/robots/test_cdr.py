"""Messages in CDR, against rosbags, which writes and reads them from ROS' own definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vtp.engines import VtpError
from vtp.serve.robots.cdr import COMPRESSED, IMAGE, STRING, Compressed, Raw, picture_from, string_cdr
from vtp.serve.robots.images import picture_of

typesys = pytest.importorskip("rosbags.typesys", reason="rosbags is not installed")
STORE = typesys.get_typestore(typesys.Stores.ROS2_HUMBLE)


def header(frame_id: str, seconds: int = 1_795_956_786, nanoseconds: int = 263_590_241) -> Any:
    time = STORE.types["builtin_interfaces/msg/Time"](seconds, nanoseconds)
    return STORE.types["std_msgs/msg/Header"](time, frame_id)


def image(frame_id: str, encoding: str, pixels: np.ndarray) -> Any:
    height, width = pixels.shape[:2]
    step = pixels.size // height
    return STORE.types[IMAGE](header(frame_id), height, width, encoding, 0, step, pixels.ravel())


@pytest.mark.parametrize("little", [True, False])
@pytest.mark.parametrize("frame_id", ["", "a", "ab", "abc", "camera", "caméra 左"])
@pytest.mark.parametrize("encoding", ["rgb8", "mono8", "yuv422_yuy2"])
def test_images(little: bool, frame_id: str, encoding: str) -> None:
    width = {"rgb8": 3, "mono8": 1, "yuv422_yuy2": 2}[encoding]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, width), dtype=np.uint8)
    data = bytes(STORE.serialize_cdr(image(frame_id, encoding, pixels), IMAGE, little_endian=little))
    read = picture_from(IMAGE, data)
    assert isinstance(read, Raw)
    assert (read.stamp_ns, read.frame_id) == (1_795_956_786_263_590_241, frame_id)
    assert (read.height, read.width, read.encoding, read.step) == (3, 4, encoding, 4 * width)
    assert bytes(read.data) == pixels.tobytes()
    if encoding == "rgb8":
        assert (picture_of(read) == pixels).all()


@pytest.mark.parametrize("little", [True, False])
@pytest.mark.parametrize("name", ["jpeg", "rgb8; jpeg compressed bgr8"])
def test_compressed_images(little: bool, name: str) -> None:
    content = np.arange(11, dtype=np.uint8)
    message = STORE.types[COMPRESSED](header("camera"), name, content)
    read = picture_from(COMPRESSED, bytes(STORE.serialize_cdr(message, COMPRESSED, little_endian=little)))
    assert isinstance(read, Compressed)
    assert (read.frame_id, read.format, bytes(read.data)) == ("camera", name, content.tobytes())


@pytest.mark.parametrize("text", ["", "a cup", "three\nlines\n", "eine Tasse für 左", "x" * 70_000])
def test_strings(text: str) -> None:
    data = string_cdr(text)
    assert STORE.deserialize_cdr(data, STRING).data == text
    assert data == bytes(STORE.serialize_cdr(STORE.types[STRING](text), STRING))


@pytest.mark.parametrize("kind", [IMAGE, COMPRESSED])
def test_what_is_cut_off_is_refused_wherever_it_is_cut(kind: str) -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    message = image("camera", "rgb8", pixels)
    if kind == COMPRESSED:
        message = STORE.types[COMPRESSED](header("camera"), "jpeg", pixels.ravel())
    data = bytes(STORE.serialize_cdr(message, kind))
    end = next(size for size in range(len(data), 0, -1) if _reads(kind, data[:size]) is None)
    assert end > 40
    for size in range(end):
        if (said := _reads(kind, data[:size])) is not None:
            assert "cut off" in said or "plain CDR" in said
        else:
            raise AssertionError(f"{size} of {len(data)} bytes were taken")


def _reads(kind: str, data: bytes) -> str | None:
    """None if it is read whole, else what is said."""
    try:
        picture_from(kind, data)
    except VtpError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x02\x00\x00" + bytes(64),  # a parameter list
        b"\x00\x07\x00\x00" + bytes(64),  # XCDR 2
        b"\x00\x01\x00\x00" + b"\xff" * 64,  # lengths of 4 GB
        b"\x00\x01\x00\x00" + bytes(8) + b"\x02\x00\x00\x00\xff\x00" + bytes(64),  # no UTF-8
        b"\x00\x01\x00\x00" + bytes(8) + b"\x02\x00\x00\x00ab" + bytes(64),  # text without its end
    ],
)
def test_other_bytes_are_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(VtpError, match=r"plain CDR|cut off or damaged"):
        picture_from(IMAGE, data)
