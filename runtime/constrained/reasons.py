"""Why a schema is not served, in our own words and with its place: llguidance's stay with its error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vtp.engines.errors import nearest, quoted_argument, shown
from vtp.runtime.constrained.errors import FormatError, refused
from vtp.runtime.generation.arguments import is_number, is_whole

__all__ = ["check_control_characters", "explained"]

_SECONDS = 1.0  # that finding the place may take
_TYPES = ["string", "number", "integer", "boolean", "object", "array", "null"]
# Keywords whose value is a schema, a list of schemas, or an object of named ones.
_SCHEMA = ("items", "additionalProperties")
_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("$defs", "definitions", "properties", "patternProperties")
_UNSERVED = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames",
    "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties",
    "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_PAIRS = (
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minProperties", "maxProperties"),
    ("minimum", "maximum"),
    ("exclusiveMinimum", "exclusiveMaximum"),
)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "multipleOf")
_TEXTS = ("pattern", "format", "$ref")
# Control characters that JSON has no short escape for, and DEL: llguidance 1.9 leaves them out of a constant.
_LOST = frozenset(map(chr, (*range(0x20), 0x7F))) - frozenset("\b\f\n\r\t")


def check_control_characters(schema: Mapping[str, Any]) -> None:
    """Raises FormatError for a const or an enum that an answer would have without some of its characters."""
    for at, part in _parts(schema, ""):
        for key in ("const", "enum"):
            if text := next((text for text in _texts(part.get(key)) if _LOST & set(text)), None):
                raise _refused(
                    _below(at, key),
                    f"{quoted_argument(text)} has a control character, which is not served; leave it out (a "
                    "line end, tab, backspace or form feed may stay)",
                )


def explained(schema: Mapping[str, Any], is_served: Callable[[Mapping[str, Any]], bool]) -> FormatError:
    """The error for a schema that was not taken: its innermost part that is not taken alone says why.

    is_served  whether the library takes a schema
    """
    until = time.monotonic() + _SECONDS
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}

    def fails(part: Mapping[str, Any]) -> bool:
        return time.monotonic() < until and not is_served({**shared, **part})

    at, part = "", schema
    while inner := next((one for one in _within(part, at) if fails(one[1])), None):
        at, part = inner
    return _refused(at, _reason(part, schema))


def _refused(at: str, text: str) -> FormatError:
    return refused(f"{shown(at)}: {text}" if at else text)


def _parts(part: Mapping[str, Any], at: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A schema and every one within, with its place such as "properties.a"."""
    yield at, part
    for place, inner in _within(part, at):
        yield from _parts(inner, place)


def _within(part: Mapping[str, Any], at: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas right below one."""
    for key in (*_NAMED, *_SCHEMAS, *_SCHEMA):
        for name, one in _named(part.get(key), key):
            if isinstance(one, Mapping):
                yield _below(at, name), one


def _named(value: object, key: str) -> Iterator[tuple[str, Any]]:
    if key in _SCHEMA:
        yield key, value
    elif key in _NAMED and isinstance(value, Mapping):
        yield from ((f"{key}.{name}", one) for name, one in value.items())
    elif key in _SCHEMAS and isinstance(value, list | tuple):
        yield from ((f"{key}.{number}", one) for number, one in enumerate(value))


def _below(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _texts(value: object) -> Iterator[str]:
    """The texts of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


# -- the reasons, the likeliest first ------------------------------------------------------------------------


def _reason(part: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    for find in (_unserved, _type, _kind, _reference, _empty, _crossed, _one_of, _pattern, _format):
        if text := find(part, root):
            return text
    return (
        "no answer can be held to this part of the schema, or it asks for what is not served; write it "
        "simpler (docs/answers.md lists what is served)"
    )


def _unserved(part: Mapping[str, Any], root: Mapping[str, Any]) -> str | None:
    key = next((key for key in _UNSERVED if key in part and (key, part[key]) != ("uniqueItems", False)), None)
    return key and f"{key} is not served; leave it out, and check the answer for it yourself"


def _type(part: Mapping[str, Any], root: Mapping[str, Any]) -> str | None:
    given = part.get("type", [])
    for one in given if isinstance(given, list | tuple) else [given]:
        if one not in _TYPES:
            hint = nearest(one, _TYPES) if isinstance(one, str) else ""
            return f"type {quoted_argument(one)} is not known; give one of {', '.join(_TYPES)}{hint}"
    return None


def _kind(part: Mapping[str, Any], root: Mapping[str, Any]) -> str | None:
    """A keyword whose value is of another kind than it takes."""
    wanted: list[tuple[tuple[str, ...], str, Callable[[Any], bool]]] = [
        (_COUNTS, "a whole number from 0", lambda value: is_whole(value) and value >= 0),
        (_BOUNDS, "a number", is_number),
        (("multipleOf",), "a number above 0", lambda value: value > 0),
        (_TEXTS, "text", lambda value: isinstance(value, str)),
        (("enum", *_SCHEMAS), "a list", lambda value: isinstance(value, list | tuple)),
        (("required",), "a list of names", _is_names),
        (_NAMED, "an object of schemas", _is_schemas),
        (_SCHEMA, "a schema, true or false", _is_schema),
    ]
    for keys, told, fits in wanted:
        for key in keys:
            if key in part and not fits(part[key]):
                return f"{key} {quoted_argument(part[key])} is not {told}"
    return None


def _is_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _is_schema(value: object) -> bool:
    return isinstance(value, bool | Mapping)


def _is_schemas(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_schema, value.values()))


def _reference(part: Mapping[str, Any], root: Mapping[str, Any]) -> str | None:
    reference = part.get("$ref")
    if not isinstance(reference, str) or (reference.startswith("#/") and _leads(reference, root)):
        return None
    return f'$ref {quoted_argument(reference)} leads nowhere; give one such as "#/$defs/NAME"'


def _leads(reference: str, root: Mapping[str, Any]) -> bool:
    found: object = root
    for name in reference[2:].split("/"):
        key = name.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found is not None


def _empty(part: Mapping[str, Any], root: Mapping[str, Any]) -> str | None:
    key = next((key for key in ("enum", "anyOf", "oneOf") if part.get(key) == []), None)
    return key and f"{key} is empty, so that no answer is possible; give at least one entry"


def _crossed(part: Mapping[str, Any], root: Mapping[str, Any]) -> str | None:
    for low, high in _PAIRS:
        least, most = part.get(low), part.get(high)
        if is_number(least) and is_number(most) and least > most:
            return f"{low} {least:g} is more than {high} {most:g}, so that no answer is possible; change one"
    return None


def _one_of(part: Mapping[str, Any], root: Mapping[str, Any]) -> str | None:
    told = "oneOf is served only of parts that exclude each other; give anyOf instead"
    return told if "oneOf" in part else None


def _pattern(part: Mapping[str, Any], root: Mapping[str, Any]) -> str | None:
    named = part.get("patternProperties")
    patterns = [part["pattern"]] if "pattern" in part else list(named) if isinstance(named, Mapping) else []
    if not patterns:
        return None
    if len(patterns) > 1:
        return "patternProperties are served only of patterns that exclude each other, without look-around"
    return (
        f"the pattern {quoted_argument(patterns[0])} is not served; give a regular expression without "
        r"look-around, \b and references to groups"
    )


def _format(part: Mapping[str, Any], root: Mapping[str, Any]) -> str | None:
    if "format" not in part:
        return None
    return f"format {quoted_argument(part['format'])} is not served; give a pattern instead, or leave it out"
