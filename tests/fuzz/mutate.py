"""Mutations as plain JSON, so that a case can be kept as a file: drawn by a seed, applied as written."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Step = list[Any]  # a mutation: its name, then what it needs

# JSON text that stands where a good value stood; by name where the text is long.
RAW: dict[str, str] = {
    **{text: text for text in ("null", "true", "false", "0", "-1", "1", "0.5", "1e400", "NaN", "-Infinity")},
    **{
        text: text
        for text in ("9223372036854775807", "2147483648", "1e18", '""', "[]", "{}", "[null]", "[0]")
    },
    **{
        text: text
        for text in ('"x"', '"../x"', '"/etc/passwd"', '"\\u0000"', '"\\ud800"', '{"":{}}', "[[0]]")
    },
    "digits": "9" * 5000,
    "long": f'"{"x" * 300}"',
    "very long": f'"{"x" * 100_000}"',
    "deep": "[" * 100_000 + "]" * 100_000,
    "fairly deep": "[" * 500 + "]" * 500,
    "terminal": '"\\u001b]0;owned\\u0007\\r\\n\\u202e\\u009b2J"',
    "many": f"[{','.join('1' * 20_000)}]",
}


class Raw(str):
    """JSON text, as it is to be written."""


class Twice(dict[str, Any]):
    """An object whose first key is written again at its end, with null."""


def dump(value: Any) -> str:
    """JSON, strict or not."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        pairs = [f"{json.dumps(key)}:{dump(item)}" for key, item in value.items()]
        if isinstance(value, Twice) and value:
            pairs.append(f"{json.dumps(next(iter(value)))}:null")
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside a JSON value; of long lists only the first entries."""
    items: Any = ()
    if isinstance(value, dict):
        items = list(value.items())[:40]
    elif isinstance(value, list):
        items = list(enumerate(value[:3]))
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def draw_json(rng: random.Random, data: Any) -> Step:
    """A change of JSON data that `change_json` makes."""
    path = list(rng.choice(list(places(data))))
    kind = rng.choice(["set", "set", "set", "drop", "rename", "twice", "nudge", "copy"])
    if kind == "set":
        return [kind, path, rng.choice(list(RAW))]
    if kind == "rename":
        return [kind, path, rng.choice(["", "x", "x" * 300, "\x1b[2J\n", "\u202e"])]
    if kind == "nudge":
        return [kind, path, rng.choice([-1, 1, 2, -(2**31), 2**31, 10**9, 10**12])]
    if kind == "copy":
        return [kind, path, list(rng.choice(list(places(data))))]
    return [kind, path]


def change_json(data: Any, steps: list[Step]) -> str:
    """The text of `data` after all steps; what a step before took away is passed over."""
    data = json.loads(json.dumps(data))
    for kind, path, *more in steps:
        owner = _find(data, path[:-1])
        if not _holds(owner, path[-1]):
            continue
        data = _CHANGES[kind](data, owner, path, *more) or data
    return dump(data)


def _find(data: Any, path: list[Any]) -> Any:
    for key in path:
        if not _holds(data, key):
            return None
        data = data[key]
    return data


def _holds(owner: Any, key: Any) -> bool:
    if isinstance(owner, dict):
        return key in owner
    return isinstance(owner, list) and isinstance(key, int) and key < len(owner)


def _set(data: Any, owner: Any, path: list[Any], name: str) -> None:
    owner[path[-1]] = Raw(RAW.get(name, name))


def _drop(data: Any, owner: Any, path: list[Any]) -> None:
    del owner[path[-1]]


def _rename(data: Any, owner: Any, path: list[Any], name: str) -> None:
    if isinstance(owner, dict):
        owner[name] = owner.pop(path[-1])


def _nudge(data: Any, owner: Any, path: list[Any], by: int) -> None:
    value = owner[path[-1]]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        owner[path[-1]] = value + by
    elif isinstance(value, str) and not isinstance(value, Raw):
        owner[path[-1]] = value + "x"


def _copy(data: Any, owner: Any, path: list[Any], source: list[Any]) -> None:
    value = _find(data, source)
    owner[path[-1]] = Raw(dump(value))


def _twice(data: Any, owner: Any, path: list[Any]) -> Any:
    if not isinstance(owner, dict):
        return None
    whole = Twice(owner)
    if len(path) == 1:
        return whole
    _find(data, path[:-2])[path[-2]] = whole
    return None


_CHANGES: dict[str, Callable[..., Any]] = {
    "set": _set,
    "drop": _drop,
    "rename": _rename,
    "nudge": _nudge,
    "copy": _copy,
    "twice": _twice,
}


def draw_bytes(rng: random.Random, size: int) -> Step:
    """A change that `change_bytes` makes; half of them near the start, where formats have their heads."""
    end = max(1, size if rng.random() < 0.5 else min(size, 256))
    place = rng.randrange(end)
    kind = rng.choice(["flip", "flip", "byte", "cut", "insert", "fill", "repeat"])
    if kind == "flip":
        return [kind, place, rng.randrange(8)]
    if kind == "byte":
        return [kind, place, rng.choice([0, 1, 0x7F, 0x80, 0xFF])]
    if kind == "insert":
        return [kind, place, rng.randbytes(rng.choice([1, 4, 60])).hex()]
    if kind in ("fill", "repeat"):
        return [kind, place, rng.choice([2, 8, 64]), rng.choice([0, 0xFF])]
    return [kind, place]


def change_bytes(data: bytes, steps: list[Step]) -> bytes:
    """`data` after all steps."""
    changed = bytearray(data)
    for kind, place, *more in steps:
        place = min(place, max(0, len(changed) - 1))
        if kind == "cut":
            del changed[place:]
        elif kind == "insert":
            changed[place:place] = bytes.fromhex(more[0])
        elif kind == "fill":
            changed[place : place + more[0]] = bytes([more[1]]) * min(more[0], len(changed) - place)
        elif kind == "repeat":
            changed[place:place] = changed[place : place + more[0]] * 20
        elif changed:
            changed[place] = changed[place] ^ (1 << more[0]) if kind == "flip" else more[0]
    return bytes(changed)


def fresh_folder(scratch: Path, source: Path) -> Path:
    """A folder with the files of `source`, linked: files are replaced, never written into."""
    folder = scratch / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file():
            os.link(path, folder / path.name)
    return folder


def put(path: Path, data: bytes) -> None:
    """Write a file in the place of a link to the original."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
