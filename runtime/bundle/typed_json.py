"""Dataclasses from JSON, read strictly: unknown keys, missing keys and values of other types are refused."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from vtp.engines import VtpError
from vtp.engines.errors import quoted
from vtp.runtime.preprocess import ImageSection, ImageSpec, spec_from_json


def built(kind: Any, data: Any, where: str) -> Any:
    """JSON data as a `kind`, a dataclass or a type of typing's; `where` is its path, for the message.

    Raises VtpError, in one line, for an unknown or a missing key and for a value of another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        return _build_union(arguments, data, where)
    if kind is ImageSpec:
        return spec_from_json(vars(_build_dataclass(ImageSection, data, where)))
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, data, where)
    if origin is list:
        _expect(isinstance(data, list), where, "a list", data)
        return [built(arguments[0], item, f"{where}[{place}]") for place, item in enumerate(data)]
    if origin is tuple:
        _expect(isinstance(data, list), where, "a list", data)
        return tuple(built(arguments[0], item, where) for item in data)
    if origin is dict:
        _expect(isinstance(data, dict), where, "an object", data)
        return {key: built(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if kind is float:
        _expect(isinstance(data, int | float) and not isinstance(data, bool), where, "a number", data)
        return float(data)
    fits = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    _expect(fits, where, "null" if kind is type(None) else kind.__name__, data)
    return data


def _build_union(choices: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in choices:
        return None
    for choice in choices:
        try:
            if choice is not type(None):
                return built(choice, data, where)
        except VtpError as error:
            last = error
    raise last


def _build_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, "an object", data)
    hints = typing.get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise VtpError(f"{where} has the unknown key '{unknown[0]}'; this bundle was made by another vtp")
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise VtpError(f"{where} lacks the key '{name}'; export the bundle again")
    return kind(**{name: built(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _expect(fits: bool, where: str, what: str, data: Any) -> None:
    if not fits:
        raise VtpError(f"{where} should be {what}, not {quoted(data, 60)}; export the bundle again")
