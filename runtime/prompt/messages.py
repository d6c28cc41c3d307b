"""The forms that a conversation may have, and whether a template kept all of its words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from vtp.engines.errors import RequestError, quoted_argument

__all__ = [
    "Messages",
    "check_kept",
    "check_messages",
    "check_text",
    "joined_text",
    "parts_of",
    "with_media",
]

#: One turn of a conversation: {"role": ..., "content": text or list of {"type": ...} parts}.
Message = Mapping[str, Any]
Messages = Sequence[dict[str, Any]]

ROLES = ("system", "user", "assistant")
MEDIA = {"image": "picture", "video": "video"}  # what users call each kind of media
_SURROGATE = re.compile("[\ud800-\udfff]")
_THOUGHT = "</think>"  # templates of reasoning models leave out what an earlier answer thought


def check_text(text: str, what: str) -> None:
    """Refuse text that is not Unicode: a lone surrogate, as broken file names and cut JSON strings have."""
    if found := _SURROGATE.search(text):
        raise RequestError(
            f"{what} holds half a character (the lone surrogate U+{ord(found[0]):04X}) at place "
            f"{found.start()}; give text that can be written as UTF-8"
        )


def check_messages(messages: object, wanted: int, media: str, most: int) -> list[dict[str, Any]]:
    """Return plain copies of well-formed messages; the first thing that is wrong becomes one line.

    wanted  how many pictures (or videos, as `media` says) are given
    most    turns and parts that there may be
    """
    word = MEDIA[media]
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of turns, not {type(messages).__name__}")
    if not messages:
        raise RequestError("messages is empty; give at least one user turn")
    if len(messages) > most:
        raise RequestError(f"the conversation has {len(messages)} turns; this bundle holds {most} tokens")
    turns = islice(messages, len(messages))  # a sequence of the caller's own may never end by itself
    checked = [_check_message(message, index, media, most) for index, message in enumerate(turns)]
    if checked[-1]["role"] != "user":
        raise RequestError(
            f"the last message is the {checked[-1]['role']}'s; end with a user turn to be answered"
        )
    images = sum(part["type"] == media for message in checked for part in parts_of(message))
    if images != wanted:
        given = f"1 {word} is" if wanted == 1 else f"{wanted} {word}s are"
        raise RequestError(
            f'the messages hold {images} {media}s, and {given} given; put one {{"type": "{media}"}} for each '
            "in the user turns"
        )
    if not any(joined_text(message).strip() for message in checked if message["role"] == "user"):
        raise RequestError(f"the prompt is empty; ask something about the {word}")
    return checked


def _check_message(message: object, index: int, media: str, most: int) -> dict[str, Any]:
    where = f"message {index}"
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        given = (
            quoted_argument(sorted(map(quoted_argument, message)))
            if isinstance(message, Mapping)
            else type(message).__name__
        )
        raise RequestError(f"{where} must have the keys role and content, and no others, not {given}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{where} has the role {quoted_argument(role)}; choose {', '.join(ROLES)}")
    role = str.__str__(role)
    if isinstance(content, str):
        check_text(content, where)
        return {"role": role, "content": str.__str__(content)}
    if not isinstance(content, list | tuple) or not content:
        raise RequestError(
            f"{where}'s content must be text or a list of parts, not {quoted_argument(content)}"
        )
    if len(content) > most:
        raise RequestError(f"{where} has {len(content)} parts; this bundle holds {most} tokens")
    return {"role": role, "content": [_check_part(part, role, where, media) for part in content]}


def _check_part(part: object, role: str, where: str, media: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part, Mapping):
        if set(part) == {"type", "text"} and isinstance(part["text"], str):
            check_text(part["text"], where)
            return {"type": "text", "text": str.__str__(part["text"])}
        raise RequestError(f'{where} has a text part of another form than {{"type": "text", "text": "..."}}')
    if kind == media and isinstance(part, Mapping):
        if set(part) != {"type"}:
            raise RequestError(
                f"{where}: give the {MEDIA[media]} as image=, and mark its place by "
                f'{{"type": "{media}"}} alone'
            )
        if role != "user":
            raise RequestError(
                f"{where} puts a {MEDIA[media]} into the {role}'s turn; only user turns may hold one"
            )
        return {"type": media}
    raise RequestError(f"{where} has a part of type {quoted_argument(kind)}; choose text or {media}")


def parts_of(message: dict[str, Any]) -> list[dict[str, str]]:
    """A turn's parts; plain text is one."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def joined_text(message: dict[str, Any]) -> str:
    """All text of one turn in one string, so that a token split over two parts is seen too."""
    return "".join(part["text"] for part in parts_of(message) if part["type"] == "text")


def with_media(messages: Messages, pictures: int, media: str, most: int) -> Messages:
    """Put the pictures before the first user turn's words where no turn says where they belong.

    `media` says what messages call them: "image" or "video"; `most` is how many turns there may be.
    """
    if not isinstance(messages, Sequence) or len(messages) > most:
        return messages  # malformed: the prompter says how
    given = list(islice(messages, len(messages)))
    if not all(isinstance(turn, Mapping) for turn in given):
        return messages
    contents = [turn.get("content") for turn in given]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    if any(isinstance(part, Mapping) and part.get("type") == media for part in parts):
        return given
    turns = [dict(turn) for turn in given]
    for turn in turns:
        if turn.get("role") == "user":
            content = turn.get("content")
            words = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if isinstance(words, list | tuple):  # anything else is malformed, as above
                turn["content"] = [*({"type": media} for _ in range(pictures)), *words]
            break
    return turns


# -- what a template left out --------------------------------------------------------------------------------


def check_kept(
    messages: list[dict[str, Any]], text: str, render: Callable[[list[dict[str, Any]]], str] | None
) -> None:
    """Refuse a template that lost a turn's words in silence, as those for parts do with plain text.

    Looked for in the rendered `text`; and, since short words may be there for another reason, in what
    `render` makes of the same turns with other words in them, each of which is found nowhere else.
    """
    for message in messages:
        for words in _words(message):
            if words.rpartition(_THOUGHT)[2].strip() not in text:
                raise RequestError(_lost(message))
    if render is None:
        return
    marked = [_marked(message, f"w{number:x}") for number, message in enumerate(messages)]
    try:
        other = render(marked)
    except Exception:  # it reads what the words say: nothing more can be told
        return
    for message, mark in zip(messages, marked, strict=True):
        if any(words not in other for words in _words(mark)):
            raise RequestError(_lost(message))


def shape_of(messages: list[dict[str, Any]]) -> tuple[Any, ...]:
    """All of a conversation but its words: a template that keeps one's words keeps those of its equals."""
    return tuple(
        (
            message["role"],
            isinstance(message["content"], str),
            *(part["type"] + " " * (not part.get("text", "").strip()) for part in parts_of(message)),
        )
        for message in messages
    )


def _words(message: dict[str, Any]) -> list[str]:
    texts = [part["text"].strip() for part in parts_of(message) if part["type"] == "text"]
    return [text for text in texts if text]


def _marked(message: dict[str, Any], name: str) -> dict[str, Any]:
    """The same turn with words of the same shape that stand nowhere else."""
    if isinstance(message["content"], str):
        return {**message, "content": _mark(message["content"], f"{name}p0")}
    content = [
        {**part, "text": _mark(part["text"], f"{name}p{place:x}")} if part["type"] == "text" else part
        for place, part in enumerate(message["content"])
    ]
    return {**message, "content": content}


def _mark(text: str, name: str) -> str:
    return f"vtp{name}q" if text.strip() else text


def _lost(message: dict[str, Any]) -> str:
    where = f"the model's chat template left out the {message['role']}'s text"
    if isinstance(message["content"], str):
        return f'{where}; give the content as a list of parts, such as [{{"type": "text", "text": "..."}}]'
    return f"{where}: this model has no place for it; put the words into the last user turn"
