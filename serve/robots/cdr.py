"""The few ROS 2 messages that are read and written without ROS, in CDR: what topics and recordings carry.

CDR of DDS (OMG formal/02-06-51 with the encapsulation of DDSI-RTPS 10.2): four bytes say the byte order, and
every number lies at a multiple of its size, counted from behind them. Text ends with a zero byte, which its
length counts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from vtp.engines.errors import VtpError

__all__ = ["COMPRESSED", "IMAGE", "STRING", "Compressed", "Picture", "Raw", "picture_from", "string_cdr"]

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
STRING = "std_msgs/msg/String"
_ORDERS = {b"\x00\x00": ">", b"\x00\x01": "<"}  # plain CDR, big and little endian
_HEAD = 4  # bytes


@dataclass(frozen=True)
class Picture:
    """What sensor_msgs/Image and CompressedImage have in common: the header, and bytes.

    stamp_ns  the header's stamp in nanoseconds; 0 if the publisher gave none
    """

    stamp_ns: int
    frame_id: str


@dataclass(frozen=True)
class Raw(Picture):
    """sensor_msgs/Image."""

    height: int
    width: int
    encoding: str
    step: int
    data: memoryview


@dataclass(frozen=True)
class Compressed(Picture):
    """sensor_msgs/CompressedImage."""

    format: str
    data: memoryview


def picture_from(kind: str, data: bytes) -> Raw | Compressed:
    """A message of type `IMAGE` or `COMPRESSED`; its `data` is a view of the bytes.

    Raises VtpError for bytes that are cut off, or are not CDR.
    """
    try:
        return _READERS[kind](_Reader(data))
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise VtpError(
            f"a message is no {kind} in CDR ({len(data)} bytes): it is cut off or damaged"
        ) from error


def string_cdr(text: str) -> bytes:
    """A std_msgs/String."""
    value = text.encode() + b"\0"
    return b"\x00\x01\x00\x00" + struct.pack("<I", len(value)) + value


class _Reader:
    """Reads values one after the other. Raises struct.error or IndexError behind the end."""

    def __init__(self, data: bytes) -> None:
        order = _ORDERS.get(bytes(data[:2]))
        if order is None or len(data) < _HEAD:
            raise VtpError(f"a message is not plain CDR: it begins with {bytes(data[:4]).hex(' ')}")
        self._order, self._body, self._place = order, memoryview(data)[_HEAD:], 0

    def number(self, code: str = "I") -> int:
        """One whole number, by struct's code."""
        size = struct.calcsize(code)
        self._place += -self._place % size
        (value,) = struct.unpack_from(self._order + code, self._body, self._place)
        self._place += size
        return int(value)

    def octets(self) -> memoryview:
        """A sequence of bytes."""
        length = self.number()
        value = self._body[self._place : self._place + length]
        if len(value) < length:
            raise IndexError
        self._place += length
        return value

    def text(self) -> str:
        """Text without its zero byte."""
        value = self.octets()
        if not len(value) or value[-1]:
            raise IndexError
        return str(value[:-1], "utf-8")


def _header(reader: _Reader) -> tuple[int, str]:
    seconds, nanoseconds = reader.number("i"), reader.number()
    return seconds * 10**9 + nanoseconds, reader.text()


def _raw(reader: _Reader) -> Raw:
    stamp, frame_id = _header(reader)
    height, width, encoding = reader.number(), reader.number(), reader.text()
    reader.number("B")  # is_bigendian, which 8-bit pixels do not have
    return Raw(stamp, frame_id, height, width, encoding, reader.number(), reader.octets())


def _compressed(reader: _Reader) -> Compressed:
    stamp, frame_id = _header(reader)
    return Compressed(stamp, frame_id, reader.text(), reader.octets())


_READERS: dict[str, Callable[[_Reader], Raw | Compressed]] = {IMAGE: _raw, COMPRESSED: _compressed}
