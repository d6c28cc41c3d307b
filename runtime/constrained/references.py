"""Which parts of a schema are schemas, and where its $ref lead.

llguidance 1.9 goes along every $ref while it compiles, on the stack of its thread: one that is full ends the
process. So it is bounded how deep that may lead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from vtp.engines.errors import quoted_argument
from vtp.runtime.constrained.errors import refused

__all__ = ["check_references", "resolved", "schemas"]

_REFERENCES = 256
_LEVELS = 512  # objects and lists in each other along $ref; 2,000 took 8 MB of stack, a thread's on Linux
_DATA = ("enum", "const", "default", "examples")  # whose values are not schemas
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # name -> schema
_OTHER_ROOT = ("$id", "id")


def schemas(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every object within that may be a schema; also what lies under keywords that are not known, and maps of
    named schemas, but not values of const and the like."""
    pending: list[tuple[Any, bool]] = [(schema, False)]
    while pending:
        part, is_map = pending.pop()
        if isinstance(part, Mapping):
            yield part
            pending += [
                (value, not is_map and key in _NAMED)
                for key, value in part.items()
                if is_map or key not in _DATA
            ]
        elif isinstance(part, list | tuple):
            pending += [(value, False) for value in part]


def resolved(root: Mapping[str, Any], reference: str) -> object:
    """What a $ref of a schema leads to, by its JSON pointer; None: nothing."""
    found: object = root
    if reference.strip("#") and not reference.startswith("#/"):
        return None  # a named place, which is not looked for
    for name in unquote(reference).split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping):
            found = found.get(key)
        elif isinstance(found, list | tuple) and key.isdecimal():
            found = found[int(key)] if len(key) < 5 and int(key) < len(found) else None
        else:
            return None
    return found


def check_references(root: Mapping[str, Any]) -> None:
    """Raises FormatError for a $ref that leads to no schema of this one, and if they lead too deep."""
    parts = list(schemas(root))
    references = [part["$ref"] for part in parts if isinstance(part.get("$ref"), str)]
    if len(references) > _REFERENCES:
        raise refused(f"the schema has {len(references)} $ref; give at most {_REFERENCES}")
    _check_roots(root, parts, references)
    known = {id(part) for part in parts}
    targets: dict[int, object] = {}
    for reference in references:
        target = resolved(root, reference)
        if not isinstance(target, bool) and id(target) not in known:
            raise refused(f'$ref {quoted_argument(reference)} leads nowhere; give one such as "#/$defs/NAME"')
        targets[id(target)] = target
    # Of the ways along $ref, none enters a part twice: they cannot be deeper than all of the parts together.
    if sum(map(_levels, (root, *targets.values()))) > _LEVELS:
        raise refused("the schema's $ref lead too deep into each other; write it flatter, or in fewer parts")


def _check_roots(root: Mapping[str, Any], parts: list[Mapping[str, Any]], references: list[str]) -> None:
    """A part with a name of its own is where its $ref begin, and not at the root."""
    for part in parts:
        for key in _OTHER_ROOT:
            if references and part is not root and isinstance(part.get(key), str):
                raise refused(f"{key} within a schema that has $ref is not served; leave it out")


def _levels(value: object) -> int:
    """Objects and lists in each other, without those that $ref add."""
    count, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, Mapping | list | tuple)]:
        count += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, Mapping) else one)]
    return count
