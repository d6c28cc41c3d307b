"""Schemas that ask too much are refused before anything compiles them; what people write is taken."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from vtp.engines.errors import UsageError
from vtp.runtime.constrained.bounds import check_schema
from vtp.runtime.constrained.patterns import _negated, check_pattern, weight

from .writing import SCHEMAS


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def doubling(key: str, count: int) -> dict[str, Any]:
    """Each definition names the one before it twice: 2^count ways, in a few hundred bytes."""
    defs: dict[str, Any] = {"d0": {"type": "string", "pattern": "a"}}
    for number in range(1, count):
        reference = {"$ref": f"#/$defs/d{number - 1}"}
        defs[f"d{number}"] = {key: [reference, reference]}
    return {"$defs": defs, "$ref": f"#/$defs/d{count - 1}"}


def circle() -> dict[str, Any]:
    return {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#"}]}}, "$ref": "#/$defs/a"}


itself: dict[str, Any] = {}
itself["items"] = itself

BAD: list[tuple[Any, str]] = [
    (5, "a JSON schema must be an object, not 5"),
    (None, "a JSON schema must be an object, not None"),
    (True, "a JSON schema must be an object, not True"),
    (nested(40), "nested more than 32 deep"),
    (itself, "nested more than 32 deep"),
    ({"enum": list(range(4100))}, "more than 4096 values"),
    ({"description": "x" * 70_000}, "the schema has 70019 bytes; give at most 65536"),
    ({"const": float("nan")}, "a value that JSON does not have"),
    ({"const": "\ud800"}, "a value that JSON does not have"),
    ({"const": b"x"}, "a value that JSON does not have"),
    ({"const": {1, 2}}, "a value that JSON does not have"),
    ({"type": "object", "x-guidance": {"lenient": True}}, "x-guidance, which requests must not set"),
    ({"$ref": "http://127.0.0.1/x"}, "$ref 'http://127.0.0.1/x' lies outside the schema"),
    ({"items": {"$ref": "file:///etc/passwd"}}, "lies outside the schema"),
    ({key: {"anyOf": [{"$ref": "#/x"}] * 100} for key in ("items", "not", "contains")}, "300 $ref"),
    ({"type": "string", "minLength": 10**6}, "minLength 1000000 is too large; give at most 100000"),
    ({"properties": {"a": {"maxItems": 10**6}}}, "maxItems 1000000 is too large"),
    ({"enum": list(range(1001))}, "enum has 1001 entries; give at most 1000"),
    ({"anyOf": [{}] * 129}, "anyOf has 129 entries"),
    ({"allOf": [{}] * 9}, "allOf has 9 entries; give at most 8"),
    ({"items": [{"type": "string"}]}, "give prefixItems for a list of them"),
    ({"properties": {f"p{number}": {} for number in range(201)}}, "an object has 201 properties"),
    ({"minProperties": 2, "required": ["a"]}, "minProperties 2 is more than the required properties"),
    ({"maximum": 1e30}, "maximum 1e+30 is too large"),
    ({"multipleOf": 999983}, "multipleOf 999983 has too many digits"),
    ({"multipleOf": 0.999983}, "multipleOf 0.999983 has too many digits"),
    ({"pattern": "a" * 600}, "a pattern has 600 characters; give at most 512"),
    ({"pattern": "^(a{1000}){1000}$"}, "repeats more than 10000 characters"),
    ({"patternProperties": {"^(a{1000}){1000}$": {}}}, "repeats more than 10000 characters"),
    ({"pattern": '^a[^"]*b$'}, "excludes a quotation mark or a backslash"),
    ({"pattern": r"^[^\\\n]$"}, "excludes a quotation mark or a backslash"),
    ({"pattern": "x[^!-~]"}, "excludes a quotation mark or a backslash"),
    ({"patternProperties": {r"[^\W]": {}}}, "excludes a quotation mark or a backslash"),
    ({"exclusiveMinimum": 2.0, "exclusiveMaximum": 2.5}, "exclusiveMinimum 2 so near to the other bound"),
    ({"minimum": -3.3, "exclusiveMaximum": -3}, "exclusiveMaximum -3 so near to the other bound"),
    (doubling("allOf", 20), "more than 256 combinations"),
    (doubling("anyOf", 20), "more than 256 combinations"),
    ({"allOf": [{"anyOf": [{"const": number} for number in range(20)]}] * 2}, "more than 256 combinations"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_too_much(schema: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        check_schema(schema)
    assert str(caught.value).startswith("response_format: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("schema", [*SCHEMAS.values(), doubling("anyOf", 7), circle(), nested(14)])
def test_what_people_write(schema: Any) -> None:
    assert json.loads(check_schema(schema)) == schema


def test_names_of_properties_are_no_keywords() -> None:
    """A property may be called pattern, $ref or maxItems, and data may look like a schema."""
    names = ["pattern", "$ref", "maxItems", "multipleOf", "allOf", "items", "enum", "properties"]
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in names},
        "required": names,
        "default": {"pattern": "(a{1000}){1000}", "maxItems": 10**9},
        "examples": [{"$ref": "http://example.org"}],
    }
    assert json.loads(check_schema(schema)) == schema


@pytest.mark.parametrize(
    ("pattern", "characters"),
    [
        ("", 0),
        ("abc", 3),
        ("a{3}", 3),
        ("a{2,5}b", 6),
        ("a{7,}", 7),
        ("(ab){10}", 20),
        ("(a(b{3}c){2}){5}", 45),
        (r"\d{4}-\d{2}-\d{2}", 10),
        (r"\({5}", 5),
        (r"\)\{3}", 4),
        ("[a-z(]{4}", 4),
        ("[]a]{4}x", 5),
        (r"[^\]]{4}", 4),
        ("((((a{50}){50}){50}){50}){50}", 50**5),
        (")a{3}", 4),
        ("(a{3}", 3),
        ("a{0}", 1),
        ("{3}", 0),
        ("a{x}", 4),
    ],
)
def test_repetitions_are_written_out(pattern: str, characters: int) -> None:
    assert weight(pattern) == characters


@pytest.mark.parametrize(
    "pattern", [r"\[^\"]", "[^a-z]{2}", "[^x\n]", r"[^\d]", r"[\"^]", r"[^\p{L}]", "[^", '"[a]']
)
def test_other_classes_are_taken(pattern: str) -> None:
    check_pattern(pattern)


@pytest.mark.parametrize("bounds", [(2.0, 3.5), (-1.5, 0.5), (0.25, 0.75), (-2.5, -1.0)])
def test_other_bounds_are_taken(bounds: tuple[float, float]) -> None:
    check_schema({"type": "number", "exclusiveMinimum": bounds[0], "exclusiveMaximum": bounds[1]})
    check_schema({"type": "integer", "exclusiveMinimum": 2, "exclusiveMaximum": 2.5})


def test_any_pattern_is_weighed() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        pattern = "".join(draw.choices("(){}[]\\ab0123,^$|*+?", k=draw.randint(0, 40)))
        assert weight(pattern) >= 0
        list(_negated(pattern))
