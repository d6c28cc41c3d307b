"""The messages of an MCAP file in the order of their time, with limits on what a file may claim.

The package mcap reads records; its own iteration believes what a chunk says of itself, so that 30 KB of a
hostile file become gigabytes, or minutes. Here a chunk is unpacked up to a limit and looked through in one
pass, in which only the messages that are wanted are held.
"""

from __future__ import annotations

import heapq
import io
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

__all__ = ["LARGEST", "Damaged", "Recorded", "read_messages"]

LARGEST = 2**30  # bytes of one record, and of the messages of chunks that overlap in time
_LARGEST_CHUNK = 2**29  # bytes, unpacked: more than the largest picture that is taken has
_CHUNK, _MESSAGE = 6, 5  # kinds of records
_HEAD = struct.Struct("<BQ")  # of a record: its kind, and its length
_MESSAGE_HEAD = struct.Struct("<HIQQ")  # channel, number, log time, publish time


class Damaged(Exception):
    """A file that contradicts itself, or claims more than is read; its text says how."""


class Recorded(NamedTuple):
    """A message: its channel's number, when it was logged (nanoseconds), and its bytes."""

    channel: int
    log_time: int
    data: bytes


def read_messages(file: BinaryIO, indexes: Iterable[Any], channels: Collection[int]) -> Iterator[Recorded]:
    """Messages of some channels, by the time at which they were logged.

    indexes  mcap's ChunkIndex records of the file; without any, messages come in the order of the file

    Raises Damaged, and whatever mcap and decompressors raise.
    """
    waiting: list[tuple[int, int, int, Any]] = [
        (index.message_start_time, index.chunk_start_offset, -1, index) for index in indexes
    ]
    if not waiting:
        yield from _unsorted(file, channels)
        return
    heapq.heapify(waiting)
    held = 0
    while waiting:
        _, offset, number, item = heapq.heappop(waiting)
        if number >= 0:
            held -= len(item.data)
            yield item
            continue
        for place, message in enumerate(_messages_of(_chunk_at(file, offset), channels)):
            held += len(message.data)
            if held > LARGEST:
                raise Damaged("too many of its chunks overlap in time")
            heapq.heappush(waiting, (message.log_time, offset, place, message))


def _unsorted(file: BinaryIO, channels: Collection[int]) -> Iterator[Recorded]:
    """Of a file without an index of its chunks, or without chunks."""
    from mcap.records import Chunk, Message
    from mcap.stream_reader import StreamReader

    file.seek(0)
    reader = StreamReader(file, emit_chunks=True, validate_crcs=True, record_size_limit=LARGEST)
    for record in reader.records:
        if isinstance(record, Chunk):
            yield from sorted(_messages_of(record, channels), key=lambda message: message.log_time)
        elif isinstance(record, Message) and record.channel_id in channels:
            yield Recorded(record.channel_id, record.log_time, record.data)


def _chunk_at(file: BinaryIO, offset: int) -> Any:
    """The chunk that an index names."""
    from mcap.data_stream import ReadDataStream
    from mcap.records import Chunk

    file.seek(offset)
    kind, length = _HEAD.unpack(file.read(_HEAD.size))
    if kind != _CHUNK or length > LARGEST:
        raise Damaged("its index names a chunk that is not there")
    return Chunk.read(ReadDataStream(io.BytesIO(file.read(length))))


def _messages_of(chunk: Any, channels: Collection[int]) -> Iterator[Recorded]:
    """The messages of a chunk that are wanted, as they lie in it."""
    data = _unpacked(chunk)
    if chunk.uncompressed_crc and zlib.crc32(data) != chunk.uncompressed_crc:
        raise Damaged("the checksum of a chunk is wrong")
    place = 0
    while place < len(data):
        kind, length = _HEAD.unpack_from(data, place)
        place += _HEAD.size
        if not kind or length > len(data) - place:
            raise Damaged("a chunk holds records that cannot be")
        if kind == _MESSAGE:
            channel, _, log_time, _ = _MESSAGE_HEAD.unpack_from(data, place)
            if channel in channels:
                body = bytes(data[place + _MESSAGE_HEAD.size : place + length])
                yield Recorded(channel, log_time, body)
        place += length


def _unpacked(chunk: Any) -> memoryview:
    """A chunk's records, as many bytes as it says. Raises Damaged for another number, or too many."""
    size = chunk.uncompressed_size
    if size > _LARGEST_CHUNK:
        raise Damaged(f"a chunk says that it has {size:,} bytes; at most {_LARGEST_CHUNK:,} are read")
    unpack = _UNPACKING.get(chunk.compression)
    if unpack is None:
        raise Damaged(f"a chunk is compressed by {chunk.compression!r}; zstd, lz4 and none are read")
    data = unpack(chunk.data, size)
    if len(data) != size:
        raise Damaged("a chunk has another size than it says")
    return memoryview(data)


def _from_zstd(data: bytes, size: int) -> bytes:
    """At most `size` bytes and one."""
    import zstandard

    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)) as reader:
        return bytes(reader.read(size + 1))


def _from_lz4(data: bytes, size: int) -> bytes:
    import lz4.frame

    return bytes(lz4.frame.LZ4FrameDecompressor().decompress(data, max_length=size + 1))


def _as_it_is(data: bytes, size: int) -> bytes:
    return data


_UNPACKING: dict[str, Callable[[bytes, int], bytes]] = {
    "": _as_it_is,
    "zstd": _from_zstd,
    "lz4": _from_lz4,
}
