"""Conversations in the forms that models' chat templates take. Knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vtp.runtime.prompt.messages import parts_of

Turns = list[dict[str, Any]]


def media_for(media: str, images: list[Any], messages: Turns) -> tuple[Any, Turns]:
    """Pictures and turns as a bundle takes them: pictures are the frames of one that answers about videos."""
    if media == "image" or not images:
        return images, messages
    return images, _one_video(messages, media)


def _one_video(messages: Turns, media: str) -> Turns:
    """The first picture's part becomes the video's, and the others go."""
    found = False
    turns = []
    for turn in messages:
        parts = []
        for part in parts_of(turn):
            if part["type"] != "image":
                parts.append(part)
            elif not found:
                parts.append({"type": media})
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
    moved: list[dict[str, str]] = []
    rest: Turns = []
    for turn in turns:
        if turn["role"] == "system":
            moved = _lines(moved, turn["content"])
        elif turn["role"] == "user" and moved:
            rest.append({**turn, "content": _lines(moved, turn["content"])})
            moved = []
        else:
            rest.append(turn)
    return turns if moved else rest


def _lines(first: Sequence[dict[str, str]], second: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Parts one after the other; where text meets text, a new line begins."""
    if first and second and first[-1]["type"] == second[0]["type"] == "text":
        return [*first[:-1], {**first[-1], "text": f"{first[-1]['text']}\n"}, *second]
    return [*first, *second]
