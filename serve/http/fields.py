"""Reading a request's JSON field by field: each is checked where it is read, null means that it is absent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from vtp.engines import VtpError
from vtp.engines.errors import quoted_argument
from vtp.engines.strict_json import parse_json
from vtp.runtime.generation.arguments import is_number, is_whole
from vtp.serve.http.errors import GONE, ApiError

_LARGE = 1 << 16  # bytes of a body that is parsed in a thread, so that other requests go on meanwhile
_MOST_VALUES = 1 << 16  # far more than a conversation has: objects of Python take a hundred times their text
_BETWEEN = (b",", b"[", b"{")  # one of them stands before each value within
_HUGE = 8 << 20  # bytes of a body: as text it may take four times as much, and what it holds once more
_ONE_BY_ONE = ThreadPoolExecutor(1, "vtp-large-body")

_Given = TypeVar("_Given")


class Fields:
    """An object of a request's body.

    at  its own place in the body, such as "messages.0"; "" is the body itself

    Every reader raises `ApiError` 400, whose `param` is the field, for a value that is not allowed.
    """

    def __init__(self, data: object, at: str = "") -> None:
        if not isinstance(data, dict):
            raise ApiError(f"{at or 'the body'} must be a JSON object, not {kind_of(data)}", param=at or None)
        self._data: dict[str, Any] = data
        self._at = at
        self._read: set[str] = set()

    def param(self, name: str) -> str:
        """Where a field lies in the body."""
        return f"{self._at}.{name}" if self._at else name

    def raw(self, name: str) -> Any:
        """A field of any kind; None: absent."""
        self._read.add(name)
        return self._data.get(name)

    def text(self, name: str) -> str | None:
        """A field that must be text."""
        value = self.raw(name)
        return value if value is None or isinstance(value, str) else self._refuse(name, "text")

    def flag(self, name: str) -> bool | None:
        """A field that must be true or false."""
        value = self.raw(name)
        return value if value is None or isinstance(value, bool) else self._refuse(name, "true or false")

    def whole(self, name: str, least: int, most: int) -> int | None:
        """A field that must be a whole number within a range; 3.0 counts as one, true does not."""
        value = self.raw(name)
        if value is None:
            return None
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        if not is_whole(number) or not least <= number <= most:
            self._refuse(name, f"a whole number from {least} to {most}")
        return int(number)

    def number(self, name: str, least: float, most: float) -> float | None:
        """A field that must be a finite number within a range."""
        value = self.raw(name)
        if value is None:
            return None
        if not is_number(value) or not least <= value <= most:
            self._refuse(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def choice(self, name: str, allowed: tuple[str, ...]) -> str | None:
        """A field that must be one of some texts."""
        value = self.text(name)
        return value if value is None or value in allowed else self._refuse(name, " or ".join(allowed))

    def items(self, name: str) -> list[Any] | None:
        """A field that must be a list."""
        value = self.raw(name)
        return value if value is None or isinstance(value, list) else self._refuse(name, "a list")

    def fields(self, name: str) -> Fields | None:
        """A field that must be an object."""
        value = self.raw(name)
        return None if value is None else Fields(value, self.param(name))

    def unread(self) -> Iterator[str]:
        """Fields that nothing asked for."""
        yield from (name for name in self._data if name not in self._read)

    def _refuse(self, name: str, wanted: str) -> Any:
        at = self.param(name)
        raise ApiError(f"{at} {quoted_argument(self._data[name])} is not {wanted}", param=at)


def kind_of(value: object) -> str:
    """What JSON calls a value's kind."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


async def read_fields(request: Request) -> Fields:
    """The body of a request, whatever its Content-Type; ApiError 400 for what is not one JSON object."""
    try:
        pieces = [piece async for piece in request.stream()]  # and not kept, as request.body() would
    except ClientDisconnect:
        raise ApiError("the client went away", GONE) from None
    return Fields(await _read(_joined, pieces, sum(map(len, pieces))))


async def fields_of(body: bytes) -> Fields:
    """A whole body's fields. ApiError 400 as `read_fields`."""
    return Fields(await _read(_parse, body, len(body)))


async def _read(parse: Callable[[_Given], Any], given: _Given, size: int) -> Any:
    """In a thread if it takes a while; bodies that take a lot of memory, too, one after the other."""
    if size <= _LARGE:
        return parse(given)
    lane = _ONE_BY_ONE if size > _HUGE else None
    return await asyncio.get_running_loop().run_in_executor(lane, parse, given)


def _joined(pieces: list[bytes]) -> Any:
    body = b"".join(pieces)
    pieces.clear()
    return _parse(body)


def _has_too_many_values(body: bytes) -> bool:
    """Counted in slices, between which other requests go on."""
    count = 0
    for start in range(0, len(body), _LARGE):
        count += sum(body.count(mark, start, start + _LARGE) for mark in _BETWEEN)
        if count > _MOST_VALUES:
            return True
    return False


def _parse(body: bytes) -> Any:
    if not body:
        raise ApiError("the body is empty; send a JSON object")
    if _has_too_many_values(body):
        raise ApiError(f"the body has more than {_MOST_VALUES:,} values; send fewer turns, or shorter ones")
    try:
        return parse_json(body, "the body")
    except VtpError as error:
        raise ApiError(str(error)) from error
