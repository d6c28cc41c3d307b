"""Why a schema is not served: in our own words, with its place, never llguidance's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vtp.engines import UsageError
from vtp.runtime.constrained.formats import Formats

from .writing import prompter, written

THEIRS = ("Unimplemented", "Unsatisfiable", "regex parse", "lookarounds", "coerce_one_of", "llguidance")
TEXT = {"type": "string"}


def nested(part: Any) -> dict[str, Any]:
    """A schema that holds a part two levels deep, beside others that are served."""
    inner = {"type": "array", "minItems": 2, "prefixItems": [TEXT, part], "items": False}
    return {"type": "object", "properties": {"a": TEXT, "b": inner, "c": TEXT}, "required": ["b"]}


WRONG: list[tuple[Any, str]] = [
    ({"type": "string", "format": "color"}, "format 'color' is not served"),
    ({"type": 5}, "type 5 is not known; give one of string"),
    ({"if": TEXT, "then": {"minLength": 3}}, "if is not served; leave it out"),
    ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties is not served"),
    ({"type": "string", "pattern": "\\bx"}, "the pattern .* is not served"),
    ({"type": "array", "minItems": -1}, "minItems -1 is not a whole number from 0"),
    ({"type": "number", "multipleOf": 0}, "multipleOf 0 is not a number above 0"),
    ({"type": "number", "minimum": 3, "maximum": 1}, "minimum 3 is more than maximum 1"),
    ({"enum": []}, "enum is empty"),
    ({"enum": 5}, "enum 5 is not a list"),
    ({"type": "object", "required": [5]}, r"required \[5\] is not a list of names"),
    ({"type": "object", "properties": 5}, "properties 5 is not an object of schemas"),
    ({"$ref": "#foo"}, r"\$ref '#foo' leads nowhere; give one such as"),
    ({"allOf": [{"type": "string"}, {"type": "number"}]}, "no answer can be held to this part"),
    ({"type": "object", "patternProperties": {"a": {}, "b": {}}}, "patternProperties are served only"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_the_innermost_part_says_why(part: Any, message: str, tmp_path: Path) -> None:
    formats = Formats(prompter("byte_level", tmp_path))
    for schema, place in ((part, ""), (nested(part), r"properties\.b\.prefixItems\.1: ")):
        if "$ref" in part and place:
            continue  # of a reference that leads nowhere, every schema around it says so, too
        with pytest.raises(UsageError, match=f"^response_format: {place}{message}") as caught:
            formats.constraint(schema)
        assert not [words for words in THEIRS if words in str(caught.value)]


@pytest.mark.parametrize("letter", [*map(chr, range(0x20)), "\x7f"])
def test_constants_keep_their_control_characters_or_are_refused(letter: str, tmp_path: Path) -> None:
    """llguidance leaves those out for which JSON has no short escape, and the answer would be another one."""
    words = prompter("byte_level", tmp_path)
    formats, text = Formats(words), f"a{letter}b"
    for schema in ({"const": text}, {"enum": [text]}, {"const": {"x": [text]}}):
        if letter in "\b\f\n\r\t":
            assert json.loads(written(formats, words, schema, 1)) in (text, {"x": [text]})
            continue
        with pytest.raises(
            UsageError, match=r"(const|enum): .* has a control character, which is not served"
        ):
            formats.constraint(schema)


def test_a_property_called_like_a_keyword_is_a_property(tmp_path: Path) -> None:
    """Neither its name nor what is in it counts as a keyword."""
    schema = {
        "type": "object",
        "properties": {"not": TEXT, "const": {"type": "integer"}, "bad": {"not": TEXT}},
    }
    formats = Formats(prompter("byte_level", tmp_path))
    with pytest.raises(UsageError, match=r"^response_format: properties\.bad: not is not served"):
        formats.constraint(schema)
    assert formats.constraint({**schema, "properties": {"not": TEXT}}) is not None
