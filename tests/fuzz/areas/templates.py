"""Chat templates of a stranger: changed ones, and ones put together from what templates can do."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from mutate import Step
from subject import Subject

from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.prompt.prompter import Prompter

_NAMES = (
    "messages",
    "message",
    "bos_token",
    "x",
    "loop",
    "range",
    "dict",
    "namespace",
    "self",
    "raise_exception",
)
_VALUES = (
    "messages", "messages[0]", "messages[0]['content']", "bos_token", "''", "'ab'", "0", "1", "-1",
    "10**30", "99999999", "[1,2]", "(1,)", "{'a': 1}", "none", "true", "1.5", "x", "loop.index",
    "range(9)", "range(10**9)", "namespace(a=1)", "''.join", "x.__class__", "messages|length", "self",
    "lipsum", "cycler(1)", "'%1000000000d'", "'{:>999999999}'", "strftime_now('%Y')",
    "strftime_now('%' * 99999)", "tools", "dict(a=1)", "'\x1b[2J'",
)  # fmt: skip
_FILTERS = (
    "upper", "trim", "tojson", "length", "list", "join('x')", "replace('a','aaaaaaaa')",
    "center(99999999)", "string", "int", "float", "sort", "reverse", "batch(3)", "slice(3)",
    "map('upper')", "groupby('role')", "indent(9999999)", "wordwrap(1)", "format(1)", "first", "last",
    "sum", "unique", "urlize", "xmlattr", "attr('__class__')", "random", "tojson(indent=99999999)", "e",
    "truncate(3)", "items", "dictsort", "select", "default('x')", "pprint", "round(400)",
)  # fmt: skip
_OPERATORS = ("+", "*", "~", "-", "/", "//", "%", "**", "in", "==", "<", "and", "or", "is not")


class Area:
    """Renders prompts with a template."""

    def __init__(self, subject: Subject, scratch: Path) -> None:
        bundle = open_bundle(subject.bundle)
        self._spec, self._tokenizer = bundle.manifest.text, bundle.path("tokenizer.json")
        self._good = str(self._spec.chat_template)

    def draw(self, rng: random.Random) -> list[Step]:
        """["cut", start, end] and ["put", place, text] on the good template, or ["all", text]."""
        if rng.random() < 0.5:
            return [["all", "".join(_statement(rng, 3) for _ in range(rng.choice([1, 2, 4])))]]
        steps: list[Step] = []
        for _ in range(rng.choice([1, 2, 3])):
            place = rng.randrange(len(self._good))
            if rng.random() < 0.4:
                steps.append(["cut", place, place + rng.choice([1, 3, 20])])
            else:
                steps.append(
                    ["put", place, rng.choice([_statement(rng, 2), _value(rng, 2), "{%", "}}", "-", "#}"])]
                )
        return steps

    def run(self, steps: list[Step]) -> None:
        """Raises VtpError for a template that is refused; any text will do."""
        text = self._good
        for kind, *more in steps:
            if kind == "all":
                text = more[0]
            elif kind == "cut":
                text = text[: more[0]] + text[more[1] :]
            else:
                text = text[: more[0]] + more[1] + text[more[0] :]
        prompter = Prompter(dataclasses.replace(self._spec, chat_template=text), self._tokenizer)
        prompter.encode(prompter.messages_for("what is red ?"))


def _value(rng: random.Random, depth: int) -> str:
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice(_VALUES)
    if kind < 0.6:
        return f"({_value(rng, depth - 1)})|{rng.choice(_FILTERS)}"
    if kind < 0.9:
        return f"({_value(rng, depth - 1)} {rng.choice(_OPERATORS)} {_value(rng, depth - 1)})"
    return f"{rng.choice(_NAMES)}({_value(rng, depth - 1)})"


def _statement(rng: random.Random, depth: int) -> str:
    inner = _statement(rng, depth - 1) if depth else "{{ x }}"
    value, name = _value(rng, 2), rng.choice(_NAMES)
    return rng.choice(
        [
            f"{{{{ {value} }}}}",
            "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
            "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}",
            f"{{% for x in {value} %}}{inner}{{% endfor %}}",
            f"{{% for x in range(99999) %}}{inner}{{% endfor %}}",
            f"{{% if {value} %}}{inner}{{% endif %}}",
            f"{{% set {name} = {value} %}}{inner}",
            f"{{% set x = x ~ x %}}{inner}",
            f"{{% macro x(a) %}}{inner}{{{{ x(a) }}}}{{% endmacro %}}{{{{ x({value}) }}}}",
            f"{{% set ns = namespace(x={value}) %}}{{% set ns.x = ns.x ~ ns.x %}}{inner}",
            f"{{% generation %}}{inner}{{% endgeneration %}}",
            f"{{% filter {rng.choice(_FILTERS)} %}}{inner}{{% endfilter %}}",
            f"{{% include {value} %}}{{% import {value} as x %}}{inner}",
            f"{{% call x() %}}{inner}{{% endcall %}}{{% break %}}",
        ]
    )
