"""What a JSON schema may ask, before any library sees it: schemas come from requests.

The bounds are far above what people write and far below what takes seconds or gigabytes to compile: both
were tried with llguidance 1.9. A schema that is taken can still be one that llguidance does not serve.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from vtp.engines.errors import quoted_argument
from vtp.runtime.constrained.errors import refused
from vtp.runtime.constrained.patterns import check_pattern
from vtp.runtime.constrained.reasons import check_control_characters
from vtp.runtime.constrained.references import check_references, resolved, schemas
from vtp.runtime.generation.arguments import is_number, is_whole

__all__ = ["check_schema"]

_BYTES = 2**16
_DEPTH = 32
_NODES = 2**12  # objects, lists and values
_COMBINATIONS = 256  # alternatives of one value, after allOf and $ref
_LARGEST_NUMBER = 1e20
# Keyword -> most that it may say.
_SIZES = {
    "minLength": 10**5,
    "maxLength": 10**5,
    "minItems": 10**4,
    "maxItems": 10**4,
    "minProperties": 200,
    "maxProperties": 200,
}
_LISTS = {"enum": 1000, "anyOf": 128, "oneOf": 128, "allOf": 8, "prefixItems": 128}
_PROPERTIES = 200  # of one object
_DIVISOR = 10**4  # of multipleOf, without its decimal point: an automaton of that many states
_DIVISORS = 4 * _DIVISOR  # of all together
_TEXT = 4096  # characters of a constant or a name: an automaton, too, that every step goes over
_TOGETHER = ("allOf", "anyOf", "oneOf", "$ref")  # hold beside the other keywords of their object
_NOTES = ("$defs", "definitions", "title", "description", "default", "examples", "$comment", "$id", "$schema")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def check_schema(schema: object) -> str:
    """A schema as JSON text. Raises FormatError for an invalid schema, and for one that asks too much."""
    if not isinstance(schema, Mapping):
        raise refused(f"a JSON schema must be an object, not {quoted_argument(schema)}")
    _check_depth(schema)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError):  # no JSON value, or half a character
        raise refused("the schema holds a value that JSON does not have") from None
    if size > _BYTES:
        raise refused(f"the schema has {size} bytes; give at most {_BYTES}")
    if "x-guidance" in schema:
        raise refused("the schema has x-guidance, which requests must not set; leave it out")
    for part in schemas(schema):
        _check_part(part)
    check_references(schema)
    _check_divisors(list(schemas(schema)))
    check_control_characters(schema)
    _Combinations(schema).check()
    return text


def _check_depth(schema: object) -> None:
    """Bound what later steps walk through."""
    level, depth, nodes = [schema], 0, 0
    while level:
        depth, nodes = depth + 1, nodes + len(level)
        if depth > _DEPTH:
            raise refused(f"the schema is nested more than {_DEPTH} deep; make it flatter")
        if nodes > _NODES:
            raise refused(f"the schema has more than {_NODES} values; make it smaller")
        level = [inner for one in level for inner in _inner(one)]


def _inner(value: object) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value


def _check_part(part: Mapping[str, Any]) -> None:
    """A keyword counts as one if its value is of its kind: there may be properties of that name."""
    for key, most in _SIZES.items():
        if is_whole(size := part.get(key)) and size > most:
            raise refused(f"{key} {size} is too large; give at most {most}")
    for key, most in _LISTS.items():
        if isinstance(some := part.get(key), list | tuple) and len(some) > most:
            raise refused(f"{key} has {len(some)} entries; give at most {most}")
    if isinstance(part.get("items"), list | tuple):
        raise refused("items must be one schema; give prefixItems for a list of them")
    for key in ("properties", "patternProperties"):
        if isinstance(named := part.get(key), Mapping) and len(named) > _PROPERTIES:
            raise refused(f"an object has {len(named)} {key}; give at most {_PROPERTIES}")
    _check_texts(part)
    _check_lengths(part)
    _check_numbers(part)


def _check_lengths(part: Mapping[str, Any]) -> None:
    """Of what an answer must have letter by letter."""
    named = part.get("properties")
    given = [part.get(key) for key in ("const", "enum", "required")]
    given.append(list(named) if isinstance(named, Mapping) else None)
    while given:
        level, given = given, []
        for one in level:
            if isinstance(one, str) and len(one) > _TEXT:
                raise refused(f"a constant or a name has {len(one)} characters; give at most {_TEXT}")
            given += [*one, *one.values()] if isinstance(one, Mapping) else _inner(one)


def _check_texts(part: Mapping[str, Any]) -> None:
    if isinstance(reference := part.get("$ref"), str) and not reference.startswith("#"):
        raise refused(
            f"$ref {quoted_argument(reference)} lies outside the schema; give one that begins with #"
        )
    if isinstance(pattern := part.get("pattern"), str):
        check_pattern(pattern)
    for pattern in (
        part.get("patternProperties") or () if isinstance(part.get("patternProperties"), Mapping) else ()
    ):
        check_pattern(pattern)
    least = part.get("minProperties")
    required = part.get("required")
    if is_whole(least) and least > (len(required) if isinstance(required, list | tuple) else 0):
        # Names that the schema does not list may come twice, and then count once.
        raise refused(f"minProperties {least} is more than the required properties; name them in required")


def _check_numbers(part: Mapping[str, Any]) -> None:
    for key in _NUMBERS:
        if is_number(bound := part.get(key)) and abs(bound) >= _LARGEST_NUMBER:
            raise refused(f"{key} {bound:g} is too large; give less than {_LARGEST_NUMBER:g}")
    _check_exclusive(part)
    if (divisor := _divisor(part)) and (_digits(divisor) > _DIVISOR or divisor > _DIVISOR):
        raise refused(
            f"multipleOf {divisor:g} has too many digits; give at most {_DIVISOR}, decimals counted"
        )


def _divisor(part: Mapping[str, Any]) -> float | None:
    divisor = part.get("multipleOf")
    return divisor if is_number(divisor) and divisor > 0 else None


def _digits(divisor: float) -> int:
    """Without its decimal point."""
    _, digits, exponent = Decimal(str(divisor)).normalize().as_tuple()
    return int("".join(map(str, digits))) * 10 ** max(int(exponent), 0)


def _check_divisors(parts: list[Mapping[str, Any]]) -> None:
    """Those that hold for one number make an automaton of all their products."""
    digits = [_digits(divisor) for part in parts if (divisor := _divisor(part))]
    if sum(digits) > _DIVISORS:
        raise refused(
            f"all multipleOf together are {sum(digits)}, decimals counted; give at most {_DIVISORS}"
        )
    if any(map(_is_together, parts)) and math.lcm(*digits) > _DIVISOR:
        raise refused("multipleOf is given more than once where parts hold together; give it once")


def _is_together(part: Mapping[str, Any]) -> bool:
    """Whether an object holds a value to more than one schema at a time."""
    own = [key for key in part if key not in _NOTES]
    several = isinstance(some := part.get("allOf"), list | tuple) and len(some) > 1
    return several or (len(own) > 1 and any(key in _TOGETHER for key in own))


def _check_exclusive(part: Mapping[str, Any]) -> None:
    """Refuse 2 < x < 2.5: llguidance 1.9 lets 2 through, where both bounds have the same whole part."""
    lower, upper = (
        [part[key] for key in keys if is_number(part.get(key))]
        for keys in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    )
    if part.get("type") == "integer" or not lower or not upper or int(max(lower)) != int(min(upper)):
        return
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if is_number(bound := part.get(key)) and bound == int(bound):
            raise refused(
                f"{key} {bound:g} so near to the other bound is not served; give one with a fraction"
            )


class _Combinations:
    """Bounds the ways in which allOf, anyOf, oneOf and $ref multiply each other."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._known: dict[int, int] = {}

    def check(self) -> None:
        """Raises FormatError."""
        for part in schemas(self._root):
            self._count(part)

    def _count(self, part: object) -> int:
        """Alternatives of one value; parts of allOf count twice at least."""
        if not isinstance(part, Mapping):
            return 1
        if id(part) in self._known:
            return self._known[id(part)]
        self._known[id(part)] = 1  # for circles
        count = 1
        together = _entries(part, "allOf")
        for entry in together:
            count = self._bounded(count * max(self._count(entry), 1 if len(together) == 1 else 2))
        for key in ("anyOf", "oneOf"):
            if some := _entries(part, key):
                count = self._bounded(count * sum(map(self._count, some)))
        if isinstance(reference := part.get("$ref"), str):
            count = self._bounded(count * self._count(resolved(self._root, reference)))
        self._known[id(part)] = count
        return count

    def _bounded(self, count: int) -> int:
        if count > _COMBINATIONS:
            raise refused(
                f"allOf, anyOf and $ref have more than {_COMBINATIONS} combinations; write the schema flatter"
            )
        return count


def _entries(part: Mapping[str, Any], key: str) -> list[Any]:
    some = part.get(key)
    return list(some) if isinstance(some, list | tuple) else []
