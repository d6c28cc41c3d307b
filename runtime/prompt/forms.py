"""Conversations from anywhere, in the forms that models' chat templates take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vtp.runtime.prompt.messages import joined_text, parts_of

Turns = list[dict[str, Any]]
Part = dict[str, str]


def one_video(messages: Turns) -> Turns:
    """A conversation whose pictures are frames of one video: the first one's part becomes the video's, and
    the others go."""
    found = False
    turns = []
    for turn in messages:
        parts = []
        for part in parts_of(turn):
            if part["type"] != "image":
                parts.append(part)
            elif not found:
                parts.append({"type": "video"})
                found = True
        turns.append({**turn, "content": parts if not isinstance(turn["content"], str) else turn["content"]})
    return turns


def forms_of(messages: Turns) -> Iterator[tuple[Turns, list[str]]]:
    """A conversation as it is, then in plainer forms, each with what was done to it, in words.

    Some templates drop text that is not in a list, some want turns of user and assistant by turns, some have
    no place for a system turn.
    """
    listed = [{**turn, "content": parts_of(turn)} for turn in messages]
    joined = _joined(listed)
    plain = _joined(_without_system(listed))
    seen: list[Turns] = []
    for turns, notes in (
        (messages, []),
        (listed, []),
        (joined, ["turns of one role in a row were joined: the model's template wants them to alternate"]),
        (plain, ["the system turn was put in front of the user's: the model's template has no place for it"]),
    ):
        if turns not in seen:
            seen.append(turns)
            yield turns, notes


def _joined(turns: Turns) -> Turns:
    """Turns of one role in a row as one."""
    joined: Turns = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            joined[-1] = {**turn, "content": _lines(joined[-1]["content"], turn["content"])}
        else:
            joined.append(turn)
    return joined


def _without_system(turns: Turns) -> Turns:
    """The words of system turns in front of the next user turn's."""
    words = ""
    rest: Turns = []
    for turn in turns:
        if turn["role"] == "system":
            words += f"{joined_text(turn)}\n"
        elif turn["role"] == "user" and words:
            rest.append({**turn, "content": _beginning_with(words, turn["content"])})
            words = ""
        else:
            rest.append(turn)
    return turns if words else rest


def _beginning_with(words: str, parts: Sequence[Part]) -> list[Part]:
    """Parts with further words in front of the first text."""
    place = next((place for place, part in enumerate(parts) if part["type"] == "text"), None)
    if place is None:
        return [*parts, {"type": "text", "text": words}]
    return [*parts[:place], {"type": "text", "text": words + parts[place]["text"]}, *parts[place + 1 :]]


def _lines(first: Sequence[Part], second: Sequence[Part]) -> list[Part]:
    """Parts one after the other; text begins a new line."""
    if first and first[-1]["type"] == "text":
        first = [*first[:-1], {**first[-1], "text": f"{first[-1]['text']}\n"}]
    return [*first, *second]
