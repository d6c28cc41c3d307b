"""Messages of ROS 2 as they are recorded and sent, in CDR: pictures and text are read, answers are written.

Written from OMG's DDSI-RTPS (plain CDR, version 1): values are aligned to their own size, counted from behind
the four bytes that say the byte order; strings end with a zero byte that their length counts.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vtp.engines import VtpError

_LITTLE = {0x00: False, 0x01: True}  # plain CDR, by the second byte
IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
STRING, BOOL = "std_msgs/msg/String", "std_msgs/msg/Bool"
_HEADER = b"\x00\x01\x00\x00"  # plain CDR, little endian


@dataclass(frozen=True)
class Header:
    """std_msgs/Header: nanoseconds of the publisher's clock, and the frame's name."""

    stamp_ns: int
    frame_id: str


@dataclass(frozen=True)
class Image:
    """sensor_msgs/Image: see `vtp.serve.robots.images`."""

    header: Header
    height: int
    width: int
    encoding: str
    step: int
    data: memoryview


@dataclass(frozen=True)
class CompressedImage:
    """sensor_msgs/CompressedImage."""

    header: Header
    format: str
    data: memoryview


def read_message(kind: str, data: bytes) -> Image | CompressedImage:
    """A message of type `kind`, which is `IMAGE` or `COMPRESSED`. Raises VtpError for bytes of none."""
    reader = _Reader(data)
    header = Header(reader.number("i") * 10**9 + reader.number("I"), reader.text())
    if kind == COMPRESSED:
        return CompressedImage(header, reader.text(), reader.bytes())
    height, width = reader.number("I"), reader.number("I")
    encoding = reader.text()
    reader.number("B")  # is_bigendian: values of one byte have no order
    return Image(header, height, width, encoding, reader.number("I"), reader.bytes())


def read_string(data: bytes) -> str:
    """The text of a message of type `STRING`. Raises VtpError for bytes of none."""
    return _Reader(data).text()


def string_message(text: str) -> bytes:
    """A message of type `STRING`."""
    value = text.encode() + b"\0"
    return _HEADER + struct.pack("<I", len(value)) + value


def bool_message(value: bool) -> bytes:
    """A message of type `BOOL`."""
    return _HEADER + bytes([value])


class _Reader:
    """Values one after the other."""

    def __init__(self, data: bytes) -> None:
        if len(data) < 4 or data[0] != 0 or data[1] not in _LITTLE:
            raise VtpError("a message is not in plain CDR, which ROS 2 writes; send or record it again")
        self._data = memoryview(data)[4:]
        self._order = "<" if _LITTLE[data[1]] else ">"
        self._place = 0

    def number(self, kind: str) -> int:
        """By its letter of `struct`."""
        size = struct.calcsize(kind)
        self._place += -self._place % size
        (value,) = struct.unpack(self._order + kind, self._take(size))
        return int(value)

    def text(self) -> str:
        taken = bytes(self._take(self.number("I")))
        return taken.rstrip(b"\0").decode("utf-8", "replace")

    def bytes(self) -> memoryview:
        return self._take(self.number("I"))

    def _take(self, size: int) -> memoryview:
        taken = self._data[self._place : self._place + size]
        if len(taken) < size:
            raise VtpError("a message is cut off; send or record it again")
        self._place += size
        return taken
