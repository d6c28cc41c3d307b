"""The one reader of JSON that somebody else may have written: strict, bounded, and one line where it refuses.

Python's own reader takes NaN, keys given twice, numbers that become infinite and text that cannot be encoded;
it fails with four kinds of exception on integers of many digits and on deep lists. Here all of it is refused.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtp.engines.disk.files import read_bounded
from vtp.engines.errors import VtpError, quoted, shown

DEPTH = 64  # lists and objects within each other
LARGEST = 2**63 - 1  # of any whole number
FILE_BYTES = 64 << 20
LINE_BYTES = 16 << 20


def read_json(
    path: str | Path, limit: int = FILE_BYTES, kind: type[VtpError] = VtpError, cure: str = ""
) -> Any:
    """What a JSON file of at most `limit` bytes holds. Raises `kind`, in one line that names the file."""
    return parse_json(_read(path, limit, kind), str(path), kind, cure)


def read_json_lines(
    path: str | Path, limit: int, kind: type[VtpError] = VtpError
) -> Iterator[tuple[str, Any]]:
    """Of a JSONL file: "FILE line N" and what the line holds; blank lines are passed over.

    Lines end in a line feed only: the other characters that end a line of text may stand in a JSON string.
    """
    text = _decode(_read(path, limit, kind), str(path), kind)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{shown(path)} line {number}"
            yield where, parse_json(line, where, kind)


def parse_json(data: bytes | str, what: str, kind: type[VtpError] = VtpError, cure: str = "") -> Any:
    """What JSON text holds; `what` names it in messages, `cure` ends them. Raises `kind`, in one line."""
    tail = f"; {cure}" if cure else ""
    text = _decode(data, what, kind) if isinstance(data, bytes) else data
    try:
        found = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_int=_whole,
            parse_float=_number,
        )
        _check(found)
    except VtpError as error:
        raise kind(f"{shown(what)}: {error}{tail}") from error
    except RecursionError as error:
        raise kind(f"{shown(what)}: {_DEEP}{tail}") from error
    except ValueError as error:
        raise kind(f"{shown(what)} is not valid JSON: {shown(error)}{tail}") from error
    return found


_DEEP = f"lists and objects lie more than {DEPTH} deep in each other"


def _read(path: str | Path, limit: int, kind: type[VtpError]) -> bytes:
    try:
        return read_bounded(path, limit)
    except VtpError as error:
        raise kind(str(error)) from error


def _decode(data: bytes, what: str, kind: type[VtpError]) -> str:
    if data.startswith(codecs.BOM_UTF8):
        raise kind(f"cannot read {shown(what)}: it begins with a byte order mark; save it without one")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02x} at {error.start}"
        raise kind(f"cannot read {shown(what)}: {byte} is not UTF-8; save it as UTF-8") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise VtpError(f"the key {quoted(_twice(pairs))} is given twice in one object; keep one")
    return found


def _twice(pairs: list[tuple[str, Any]]) -> str:
    """The first key that has come before."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("no key is given twice")


def _refuse_constant(text: str) -> Any:
    raise VtpError(f"{text} is not a JSON number; give a finite number")


def _whole(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > LARGEST:
        raise VtpError(f"the number {shown(text, 40)} is too large; the largest is {LARGEST}")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise VtpError(f"the number {shown(text, 40)} is too large; give a finite one")
    return value


def _check(found: Any) -> None:
    """Refuse depths that readers with recursion cannot follow, and text that no file can hold."""
    level = [found]
    for _ in range(DEPTH + 1):
        if not level:
            return
        level = [item for one in level for item in _parts(one)]
    raise VtpError(_DEEP)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, dict):
        yield from value
        yield from value.values()


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise VtpError(
            f"{quoted(text, 60)} holds half of a surrogate pair, which is not a character"
        ) from error
