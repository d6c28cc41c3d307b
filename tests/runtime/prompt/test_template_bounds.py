"""Strangers' chat templates end within bounds; those of real models render as in transformers."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from vtp.engines.errors import VtpError
from vtp.runtime.prompt.template import ChatTemplate, TemplateLimit

from .hostile_templates import HOSTILE

PROGRAM = Path(__file__).parent / "hostile_templates.py"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def verdicts(units: int, limit: float, *names: str) -> dict[str, dict[str, Any]]:
    """What a child with little memory finds of each template; `limit` seconds guard against a hang."""
    command = [sys.executable, str(PROGRAM), str(units), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["name"]: line for line in found}


def check(found: dict[str, dict[str, Any]], names: set[str]) -> None:
    assert set(found) == names
    for name, line in found.items():
        assert line["error"] not in (None, "MemoryError"), name
        assert "\n" not in line["line"] and 0 < len(line["line"]) < 400, name


def test_hostile_templates_stop() -> None:
    """With an eighth of the budget, so that it takes an eighth of the time."""
    check(verdicts(2**24, 240.0), set(HOSTILE))


@pytest.mark.slow
def test_hostile_templates_stop_at_the_real_budget() -> None:
    check(verdicts(0, 600.0), set(HOSTILE))


def test_a_second_rendering_has_a_budget_of_its_own() -> None:
    template = ChatTemplate("{% for i in range(20000) %}{{ i }}{% endfor %}")
    for _ in range(12):  # each takes about a tenth of one
        assert len(template.render()) == sum(len(str(number)) for number in range(20000))
    greedy = ChatTemplate("{{ 'a' * count }}")
    with pytest.raises(TemplateLimit, match="more work"):
        greedy.render(count=10**9)
    assert greedy.render(count=3) == "aaa"


def test_templates_that_do_not_compile_are_one_line() -> None:
    for source in (
        "{% if %}",
        "{{",
        "{% for x in y %}",
        "{{ x | no_such_filter }}",
        "{{ (" * 5000,
        "{% zzz %}",
    ):
        with pytest.raises(VtpError, match="does not compile") as caught:
            ChatTemplate(source)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


# -- real templates ------------------------------------------------------------------------------------------


def shipped_templates() -> dict[str, str]:
    """The chat templates that transformers' own code holds."""
    found = {}
    for name in ("smolvlm", "llama4", "qwen2_audio"):
        spec = importlib.util.find_spec(f"{transformers.__name__}.models.{name}.processing_{name}")
        assert spec is not None and spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        found[name] = next(
            t for t in texts if isinstance(t, str) and "{%" in t and "add_generation_prompt" in t
        )
    return found


FOLDER = (
    Path(__file__).parent / "templates"
)  # as models on the hub have them; macros and methods: all of Jinja
REAL = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
REAL |= shipped_templates()
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "é": [1, 2.5, None]}}}
]
THOUGHT = "<think>\nwhat is it\n</think>\n\na star"
PICTURE: list[dict[str, str]] = [{"type": "image"}, {"type": "text", "text": " what's  this ?\n"}]
TURNS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "what color is the star ?"}],
    [{"role": "user", "content": PICTURE}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "naïve 東京 🙂 </think> <b> &"}],
    [{"role": "user", "content": PICTURE},
     {"role": "assistant", "content": [{"type": "text", "text": "a star"}]},
     {"role": "user", "content": [{"type": "text", "text": "sure ?"}, {"type": "text", "text": "why ?"}]}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}, {"role": "assistant",
     "content": THOUGHT}, {"role": "user", "content": "x" * 5000}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "a"},
     {"role": "assistant", "content": "b"}],
]  # fmt: skip


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_real_templates_render_as_in_transformers(name: str, tools: Any) -> None:
    """Text for text; and where the template raises there, with the same words."""
    template, rendered = ChatTemplate(REAL[name]), 0
    for turns in TURNS:
        try:
            wanted: Any = render_jinja_template(
                [turns], tools=tools, chat_template=REAL[name], add_generation_prompt=True, **SPECIAL
            )
        except Exception as error:
            with pytest.raises(type(error)) as caught:
                template.render(messages=turns, tools=tools, add_generation_prompt=True, **SPECIAL)
            assert str(caught.value) == str(error)
            continue
        found = template.render(
            messages=turns, tools=tools, documents=None, add_generation_prompt=True, **SPECIAL
        )
        assert found == wanted[0][0]
        rendered += 1
    assert rendered >= 2


def test_long_conversations_fit_the_budget() -> None:
    """A thousand turns, and a turn of a million characters, are far from any bound."""
    many = [{"role": ("user", "assistant")[at % 2], "content": f"turn {at}"} for at in range(1001)]
    long = [{"role": "user", "content": "what is it ? " * 80_000}]
    for name in ("qwen2_vl", "qwen3", "llama3_tools", "gemma3", "chatml"):
        for turns in (many, long):
            wanted: Any = render_jinja_template(
                [turns], chat_template=REAL[name], add_generation_prompt=True, **SPECIAL
            )
            found = ChatTemplate(REAL[name]).render(
                messages=turns, tools=None, documents=None, add_generation_prompt=True, **SPECIAL
            )
            assert found == wanted[0][0]
