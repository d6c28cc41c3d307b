"""The strict reader of JSON: what each kind of damage says; good files read as by Python's own reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vtp.engines import UsageError, VtpError, strict_json
from vtp.engines.strict_json import DEPTH, parse_json, read_json, read_json_lines


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "is not valid JSON: Expecting value: line 1"),
        (b"{", "is not valid JSON: Expecting property name"),
        (b'{"a": 1} x', "Extra data"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"[1e400]", "1e400 is too large"),
        (b"[-1e999]", "-1e999 is too large"),
        (b"[" + b"9" * 5000 + b"]", "is too large"),
        (b"[9223372036854775808]", "9223372036854775808 is too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
        (b"[" * 100_000 + b"]" * 100_000, "more than 64 deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "more than 64 deep"),
        (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "more than 64 deep"),
        (b'["\xff"]', "byte 0xff at 2"),
        ('["é"]'.encode("utf-16"), "0xff at 0 is not UTF-8"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'["a\\ud800b"]', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b'["a\x00b"]', "Invalid control character"),
        (b'{"' + b"\\u001b[2J" * 999 + b'": 1e999}', "is too large"),
    ],
)
def test_what_is_refused_is_one_line_that_names_the_file(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "some\x1b.json"
    path.write_bytes(text)
    with pytest.raises(UsageError) as refused:
        read_json(path, kind=UsageError, cure="make it again")
    line = str(refused.value)
    assert says in line and "some\\x1b.json" in line and line.isprintable() and len(line) < 1000
    if b"\xef\xbb" not in text and "UTF-8" not in line and "byte" not in line:
        assert line.endswith("; make it again")


def test_good_json_is_what_pythons_reader_says() -> None:
    data = {"a": [1, -2.5e300, True, None, "é→\u2028👩", {"": "\x1b"}], "n": -(2**63) + 1, "deep": [[[]]]}
    for text in (json.dumps(data), json.dumps(data, ensure_ascii=False).encode()):
        assert parse_json(text, "x") == data
    deep = "[" * DEPTH + "]" * DEPTH
    assert parse_json(deep, "x") == json.loads(deep)


def test_lines_end_in_line_feeds_only(tmp_path: Path) -> None:
    """Other ends of lines may stand in JSON strings as they are."""
    path = tmp_path / "q.jsonl"
    rows = [{"a": "x\u2028y\x85z"}, {"b": 2}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\r\n\n".join(lines) + "\n", encoding="utf-8", newline="")
    assert list(read_json_lines(path, 999)) == [(f"{path} line 1", rows[0]), (f"{path} line 3", rows[1])]
    path.write_text("{}\n[1e999]\n")
    with pytest.raises(VtpError, match=r"q\.jsonl line 2: the number 1e999"):
        list(read_json_lines(path, 999))


def test_a_file_without_an_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"[1]")
    assert read_json(path, limit=3) == [1]
    with pytest.raises(VtpError, match="larger than 2 bytes"):
        read_json(path, limit=2)


def test_the_key_that_comes_twice_is_found_in_one_pass() -> None:
    class Key(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Key.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    pairs = [(Key(number), 0) for number in range(2000)] + [(Key(1999), 1)]
    with pytest.raises(VtpError, match="the key '1999' is given twice"):
        strict_json._object(pairs)
    assert Key.compared < 4000  # each against each would be two million
