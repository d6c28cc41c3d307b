"""How many parts a picture's file consists of.

Pillow reads segments, chunks, blocks and runs one after the other in Python, so that a file of a few
megabytes with millions of them would take half a minute, each time; and libjpeg goes over all blocks once a
scan.
"""

from __future__ import annotations

import re

__all__ = ["is_crowded"]

_MOST = 1 << 14  # segments of a JPEG, chunks of a PNG: 32 MiB in chunks of 8 KiB are 4096
_MOST_BLOCKS = 1 << 18  # of a GIF's first two frames: 32 MiB in blocks of 255 bytes are half of that
_FRAMES = 2  # Pillow looks whether there is a second one
_MOST_SCANS = 100  # of a JPEG, each of which takes as long as all of its blocks; programs write about ten
_MOST_EXIF = 16  # segments of 64 KiB, which Pillow joins one by one; cameras write one
_MOST_RUNS = 1 << 21  # pixels of a BMP in runs, and its bytes: Pillow takes a microsecond for each
# The marker behind a scan: within one, 255 is followed by 0, or by what restarts it.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def is_crowded(data: bytes) -> bool:
    """Whether a file has more parts than any camera or program writes; False for other formats."""
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"BM"):
        return _bmp(data)
    return data[:4] == b"GIF8" and _gif(data)


def _jpeg(data: bytes) -> bool:
    """Segments up to the end; a byte that belongs to none counts as one."""
    place, scans, exifs = 2, 0, 0
    for _ in range(_MOST):
        marker = data[place + 1 : place + 2] if data[place : place + 1] == b"\xff" else b""
        if place >= len(data) or (scans and marker == b"\xd9"):
            return False
        exifs += marker == b"\xe1" and data.startswith(b"Exif\0\0", place + 4)
        scans += marker == b"\xda"
        if scans > _MOST_SCANS or exifs > _MOST_EXIF:
            return True
        alone = marker in (b"", b"\x00", b"\xff", b"\x01") or b"\xd0" <= marker <= b"\xd9"
        place += 1 if alone else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == b"\xda":
            place = _after_scan(data, place)
    return True


def _after_scan(data: bytes, place: int) -> int:
    found = _MARKER.search(data, place)
    return found.start() if found else len(data)


def _bmp(data: bytes) -> bool:
    """Whether it has many runs, or many pixels of them."""
    header, width, height = (int.from_bytes(data[at : at + 4], "little", signed=True) for at in (14, 18, 22))
    in_runs = header >= 40 and int.from_bytes(data[30:34], "little") in (1, 2)
    return in_runs and max(abs(width * height), len(data)) > _MOST_RUNS


def _png(data: bytes) -> bool:
    place = 8
    for _ in range(_MOST):
        if place >= len(data):
            return False
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return True


def _gif(data: bytes) -> bool:
    """Blocks up to the second frame's end; a byte that belongs to none counts as one."""
    place, frames, left = 13 + _table(data[10:11]), 0, _MOST_BLOCKS
    while place < len(data) and frames < _FRAMES and left > 0:
        kind = data[place : place + 1]
        left -= 1
        if kind == b"!":
            place, left = _after_blocks(data, place + 2, left)
        elif kind == b",":
            frames += 1
            place, left = _after_blocks(data, place + 11 + _table(data[place + 9 : place + 10]), left)
        else:
            place += 1
    return left <= 0


def _table(flags: bytes) -> int:
    """Bytes of a table of colours."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 128 else 0


def _after_blocks(data: bytes, place: int, left: int) -> tuple[int, int]:
    """Behind the empty block that ends some, and how many may still come."""
    while place < len(data) and left > 0:
        size = data[place]
        place, left = place + 1 + size, left - 1
        if not size:
            break
    return place, left
