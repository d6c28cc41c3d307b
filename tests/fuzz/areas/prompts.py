"""Prompts and conversations of every shape: refused in one line, or rendered without losing a word."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from mutate import Step
from subject import Subject, Wrong

from vtp.runtime import Pipeline

_TEXTS = (
    "what is red ?", "", " ", "<image>", "<s>", "</s>", "x" * 90, "x" * 100_000, "naïve 你好", "🙂👩‍💻",
    "\x00", "\x1b[2J", "\ud800", "\u202e", "a\r\nb\tc", "{{ 7*7 }}", "{% raise %}", "USER:", "<img",
    "&lt;", "\ufeffx", "é", "e\u0301",
)  # fmt: skip
_ODD: dict[str, Any] = {
    "none": None, "zero": 0, "nan": float("nan"), "bytes": b"x", "true": True, "list": [], "dict": {},
    "set": {1}, "tuple": ("a",), "object": object(), "huge": 10**5000, "nested": [[[]]], "class": dict,
}  # fmt: skip


class Area:
    """Asks a pipeline that stays open; what it answers must not depend on what was refused before."""

    def __init__(self, subject: Subject, scratch: Path) -> None:
        self._picture = subject.picture
        self._pipe = Pipeline.load(subject.bundle, "ort-cpu", threads=1)
        self._right = self._pipe.generate(self._picture, "what is red ?", max_new_tokens=2).token_ids

    def draw(self, rng: random.Random) -> list[Step]:
        """["prompt", value], or turns: ["turn", role, part...]; a part is ["text", value] or ["image"]."""
        if rng.random() < 0.3:
            return [["prompt", _draw_value(rng)]]
        turns: list[Step] = []
        for _ in range(rng.choice([0, 1, 1, 2, 3, 5])):
            role = rng.choice(["user", "user", "assistant", "system", "tool", "", "User", ["odd", "none"]])
            parts = [_draw_part(rng) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
            turns.append(["turn", role, rng.choice(["list", "list", "text", "tuple", "none"]), *parts])
        return turns or [["turn"]]

    def run(self, steps: list[Step]) -> None:
        """Raises VtpError for what is refused."""
        if steps[0][0] == "prompt":
            self._ask([_value(steps[0][1])], prompt=_value(steps[0][1]))
        else:
            messages = [_turn(step) for step in steps if len(step) > 1]
            words = [word for step in steps if len(step) > 1 for word in _words(step)]
            self._ask(words, messages=messages)
        again = self._pipe.generate(self._picture, "what is red ?", max_new_tokens=2).token_ids
        if again != self._right:
            raise Wrong(f"afterwards {again} instead of {self._right}")

    def _ask(self, words: list[Any], **asked: Any) -> None:
        self._pipe.generate(self._picture, max_new_tokens=2, **asked)
        messages = asked.get("messages") or self._pipe._prompter.messages_for(asked["prompt"])
        text = self._pipe._prompter.encode(messages).text
        for word in words:
            if isinstance(word, str) and word.strip() not in text:
                raise Wrong(f"the prompt lost {word[:80]!r}: {text[:200]!r}")


def _draw_value(rng: random.Random) -> Step:
    return ["odd", rng.choice(list(_ODD))] if rng.random() < 0.3 else ["is", rng.choice(_TEXTS)]


def _draw_part(rng: random.Random) -> Step:
    kind = rng.choice(["text", "text", "text", "image", "video", "odd", "more"])
    return [kind, _draw_value(rng)] if kind in ("text", "odd", "more") else [kind]


def _value(step: Any) -> Any:
    return (_ODD[step[1]] if step[0] == "odd" else step[1]) if isinstance(step, list) else step


def _turn(step: Step) -> Any:
    _, role, form, *parts = step
    content: Any = [_part(part) for part in parts]
    if form == "text":
        content = next((_value(part[1]) for part in parts if part[0] == "text"), "x")
    elif form == "tuple":
        content = tuple(content)
    elif form == "none":
        return {"role": _value(role)}
    return {"role": _value(role), "content": content}


def _part(part: Step) -> Any:
    if part[0] == "odd":
        return _value(part[1])
    if part[0] == "more":
        return {"type": "text", "text": "x", "more": _value(part[1])}
    return {"type": part[0], **({"text": _value(part[1])} if part[0] == "text" else {})}


def _words(step: Step) -> list[Any]:
    """The texts that a turn says."""
    _, _, form, *parts = step
    texts = [_value(part[1]) for part in parts if part[0] == "text"]
    if form == "text":
        return texts[:1]
    return [] if form == "none" else texts
