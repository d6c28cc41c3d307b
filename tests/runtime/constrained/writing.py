"""Writes answers of a form without a model: allowed tokens are drawn, and after a while towards an end.

The oracle is the real jsonschema, on what json.loads makes of the detokenized text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from vtp.runtime.constrained.formats import Formats
from vtp.runtime.prompt.prompter import Detokenizer, Prompter

from ..prompt.tokenizer_kinds import TOKENIZERS, spec_for

END = 2  # </s> of these tokenizers

OBSERVATION = {"type": "string", "minLength": 2, "maxLength": 12}
# As Frigate asks for reviews: lengths, numbers of items and bounds of numbers, nothing else.
REVIEW: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 3, "maxLength": 20},
        "scene": {"type": "string", "minLength": 15, "maxLength": 40},
        "observations": {"type": "array", "items": OBSERVATION, "minItems": 3, "maxItems": 8},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        "potential_threat_level": {"type": "integer", "minimum": 0, "maximum": 2},
    },
    "required": ["title", "scene", "observations", "confidence", "potential_threat_level"],
    "additionalProperties": False,
}
# As pydantic writes models: $defs, anyOf with null, enums, defaults, titles.
NESTED: dict[str, Any] = {
    "$defs": {
        "Color": {"enum": ["red", "green"], "title": "Color", "type": "string"},
        "Thing": {
            "additionalProperties": False,
            "properties": {
                "color": {"$ref": "#/$defs/Color"},
                "at": {
                    "prefixItems": [{"type": "integer"}, {"type": "integer"}],
                    "items": False,
                    "minItems": 2,
                },
                "note": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}], "default": None},
            },
            "required": ["color", "at"],
            "type": "object",
        },
    },
    "additionalProperties": False,
    "properties": {
        "things": {"items": {"$ref": "#/$defs/Thing"}, "maxItems": 2, "type": "array"},
        "found": {"type": "boolean"},
    },
    "required": ["things", "found"],
    "type": "object",
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "review": REVIEW,
    "nested": NESTED,
    "object": {"type": "object"},
    "anything": {},
    "unicode": {
        "type": "object",
        "properties": {
            "größe 東": {"const": 'naïve 🙂 "x" \\ /\n'},
            "a": {"enum": [None, 1, -1.5, "é", {"b": [1]}]},
        },
        "required": ["größe 東", "a"],
        "additionalProperties": False,
    },
    "lengths": {"type": "string", "minLength": 4, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "date": {"type": "string", "format": "date"},
    "whole": {"type": "integer", "minimum": -3, "exclusiveMaximum": 300},
    "divided": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 99},
    "between": {"type": "number", "exclusiveMinimum": 0.25, "maximum": 0.75},
    "either": {"anyOf": [{"type": "integer", "minimum": 5, "maximum": 9}, {"type": "array", "maxItems": 1}]},
    "one": {"oneOf": [{"type": "null"}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}]},
    "both": {"allOf": [{"type": "string", "minLength": 3}, {"maxLength": 4}]},
    "named": {
        "type": "object",
        "patternProperties": {"^[a-c]{1,2}$": {"type": "integer", "minimum": 0, "maximum": 5}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "tree": {
        "$defs": {"node": {"additionalProperties": False, "properties": {"next": {"$ref": "#/$defs/node"}}}},
        "$ref": "#/$defs/node",
        "type": "object",
    },
}  # fmt: skip


def prompter(name: str, folder: Path) -> Prompter:
    """One of the tests' tokenizers, as a bundle's."""
    TOKENIZERS[name].save(str(folder / "tokenizer.json"))
    return Prompter(spec_for(None), folder / "tokenizer.json")


def written(formats: Formats, words: Prompter, wanted: Any, seed: int, most: int = 1500) -> str:
    """One answer; fails if it does not end."""
    constraint = formats.constraint(wanted)
    assert constraint is not None
    draw, detokenizer, text = np.random.default_rng(seed), Detokenizer(words.tokenizer, words.decoding), ""
    count = words.tokenizer.get_vocab_size()
    for place in range(most):
        ids = np.flatnonzero(constraint.allowed(count)).tolist()
        token = _preferred(ids, words) if place > 60 and draw.random() < 0.95 else int(draw.choice(ids))
        constraint.add(token)
        if token != END:
            text += detokenizer.push(token)
        if token == END or constraint.complete:
            return text + detokenizer.finish()
    raise AssertionError(f"no end: {text[:200]!r}")


def _preferred(ids: list[int], words: Prompter) -> int:
    """A token that comes nearer to the end."""
    if END in ids:
        return END
    by_bytes = {words.token_bytes.of(token): token for token in ids}
    signs = (b'"',) if b"z" in by_bytes else (b"}", b"]", b":", b'"', b"1", b"0")  # in a string, or outside
    return next((by_bytes[sign] for sign in signs if sign in by_bytes), ids[-1])


def check(text: str, schema: dict[str, Any]) -> Any:
    """The value of an answer; fails unless it is JSON that satisfies its schema."""
    value = json.loads(text)
    jsonschema.Draft202012Validator(schema).validate(value)
    return value
