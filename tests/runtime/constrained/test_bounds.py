"""Schemas that ask too much are refused before anything compiles them; what people write is taken."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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


def chain(count: int, depth: int, wrap: Callable[[Any], Any]) -> dict[str, Any]:
    """Each definition leads to the next one, a few levels within it."""
    defs: dict[str, Any] = {f"d{count}": {"type": "integer"}}
    for number in range(count):
        part: Any = {"$ref": f"#/$defs/d{number + 1}"}
        for _ in range(depth):
            part = wrap(part)
        defs[f"d{number}"] = part
    return {"$defs": defs, "$ref": "#/$defs/d0"}


# Ways in which a part may lie in another; with the levels of JSON that each has.
WITHIN: dict[str, tuple[Callable[[Any], Any], int]] = {
    "items": (lambda part: {"type": "array", "items": part, "minItems": 1}, 1),
    "additionalProperties": (lambda part: {"additionalProperties": part}, 1),
    "prefixItems": (lambda part: {"prefixItems": [part]}, 2),
    "properties": (lambda part: {"type": "object", "properties": {"a": part}, "required": ["a"]}, 2),
    "patternProperties": (lambda part: {"patternProperties": {"a": part}}, 2),
    "anyOf": (lambda part: {"anyOf": [part, {"type": "null"}]}, 2),
    "allOf": (lambda part: {"allOf": [part]}, 2),
    "unknown": (lambda part: part, 0),
}
LEVELS = 512


def deepest(name: str) -> dict[str, Any]:
    """As deep as is taken."""
    wrap, levels = WITHIN[name]
    each = 4 * levels + 1
    return chain(min(250, (LEVELS - 34) // each), 4, wrap)


def divisors(*numbers: float, key: str = "multipleOf") -> list[dict[str, Any]]:
    return [{"type": "number", key: number} for number in numbers]


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
    *((chain(150, 4, wrap), "$ref lead too deep") for wrap, levels in WITHIN.values() if levels),
    ({"$ref": "#/nowhere"}, "$ref '#/nowhere' leads nowhere"),
    ({"$ref": "#named", "$defs": {"a": {"$anchor": "named"}}}, "$ref '#named' leads nowhere"),
    ({"$ref": "#/default/a", "default": {"a": {"maxItems": 10**9}}}, "$ref '#/default/a' leads nowhere"),
    ({"$ref": "#/const/0", "const": [{"pattern": "a{99999}"}]}, "$ref '#/const/0' leads nowhere"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$id": "b", "$defs": {}}}}, "$id within a schema that has $ref"),
    ({"properties": {"default": {"maxItems": 10**6}}}, "maxItems 1000000 is too large"),
    ({"properties": {"const": {"properties": {"enum": {"pattern": "a{99999}"}}}}}, "repeats more than 10000"),
    ({"prefixItems": divisors(*range(9000, 9005))}, "all multipleOf together are 45010"),
    ({"allOf": divisors(997, 991)}, "multipleOf is given more than once where parts hold together"),
    ({"allOf": divisors(0.997, 9.91)}, "multipleOf is given more than once where parts hold together"),
    ({"multipleOf": 997, "anyOf": divisors(991, 3)}, "multipleOf is given more than once"),
    ({"$defs": {"a": {"multipleOf": 997}}, "$ref": "#/$defs/a", "multipleOf": 991}, "multipleOf is given"),
    ({"allOf": [{"properties": {"a": one}} for one in divisors(997, 991)]}, "multipleOf is given more"),
    ({"const": "x" * 4097}, "a constant or a name has 4097 characters; give at most 4096"),
    ({"items": {"enum": [1, {"a": ["x" * 4097]}]}}, "a constant or a name has 4097 characters"),
    ({"const": {"x" * 4097: 1}}, "a constant or a name has 4097 characters"),
    ({"properties": {"x" * 4097: {}}}, "a constant or a name has 4097 characters"),
    ({"required": ["x" * 4097]}, "a constant or a name has 4097 characters"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_too_much(schema: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        check_schema(schema)
    assert str(caught.value).startswith("response_format: ") and "\n" not in str(caught.value)


# Models of pydantic's that hold each other, more than an API has.
MODELS: dict[str, Any] = {
    "$id": "https://example.org/models",
    "$defs": {
        f"M{number}": {
            "type": "object",
            "properties": {
                "next": {"anyOf": [{"$ref": f"#/$defs/M{number + 1}"}, {"type": "null"}], "default": None},
                "price": {"type": "number", "multipleOf": 0.01, "minimum": 0},
                "all": {"type": "array", "items": {"$ref": "#"}},
            },
        }
        for number in range(60)
    }
    | {"M60": {"enum": ["a", "b"]}},
    "$ref": "#/$defs/M0",
}
TAKEN: list[Any] = [
    MODELS,
    {"prefixItems": [{"items": {"$ref": "#/prefixItems/1"}}, {"type": "integer"}, True]},
    {"$defs": {"a b/~": True}, "properties": {"a": {"$ref": "#/%24defs/a%20b~1~0"}}},
    {"properties": {"a": {"multipleOf": 9000}, "b": {"multipleOf": 9001}}},
    {"allOf": divisors(60, 40, 0.5), "description": "x" * 5000},
    {"items": {"id": "a name of a part"}},
    {"const": "x" * 4096},
]


@pytest.mark.parametrize("schema", [*SCHEMAS.values(), doubling("anyOf", 7), circle(), nested(14), *TAKEN])
def test_what_people_write(schema: Any) -> None:
    assert json.loads(check_schema(schema)) == schema


def test_names_of_properties_are_no_keywords() -> None:
    """A property may be called pattern, $ref or maxItems, and data may look like a schema."""
    names = [
        "pattern",
        "$ref",
        "maxItems",
        "multipleOf",
        "allOf",
        "items",
        "enum",
        "properties",
        "default",
        "id",
    ]
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in names},
        "required": names,
        "default": {"pattern": "(a{1000}){1000}", "maxItems": 10**9},
        "examples": [{"$ref": "http://example.org"}],
    }
    assert json.loads(check_schema(schema)) == schema


COMPILED = """
import json, sys, threading
from pathlib import Path
from tests.runtime.constrained.writing import prompter
from vtp.engines.errors import UsageError
from vtp.runtime.constrained.formats import Formats
threading.stack_size(4 << 20)  # half of what a thread has on Linux
formats = Formats(prompter("byte_level", Path(sys.argv[1])))
for schema in json.load(sys.stdin):
    assert formats.constraint(schema) is not None
"""


def test_the_deepest_that_is_taken_leaves_stack(tmp_path: Path) -> None:
    """llguidance goes along every $ref on the stack of its thread, and a full one ends the process."""
    schemas = [deepest(name) for name in WITHIN]
    for schema in schemas:
        check_schema(schema)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(tmp_path)],
        input=json.dumps(schemas),
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


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
