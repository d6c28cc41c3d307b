"""OpenAI's messages as the runtime's turns, and the pictures in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtp.engines.errors import quoted_argument
from vtp.serve.http.asking import PictureSource
from vtp.serve.http.errors import ApiError
from vtp.serve.http.fields import Fields, kind_of

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
DETAILS = ("low", "auto", "high")  # ascending
_MOST_TURNS = 4096  # long before that the model's cache is full


class Reader:
    """Reads a list of messages; `pictures` and `details` are then those of all of them, in order."""

    def __init__(self) -> None:
        self.pictures: list[PictureSource] = []
        self.details: list[str] = []
        self.unread: list[str] = []

    def turns(self, messages: object) -> list[dict[str, Any]]:
        """The turns. Raises ApiError, which names the field."""
        if not isinstance(messages, list):
            raise ApiError(f"messages must be a list of turns, not {kind_of(messages)}", param="messages")
        if not messages:
            raise ApiError("messages is empty; give at least one user turn", param="messages")
        if len(messages) > _MOST_TURNS:
            raise ApiError(
                f"messages has {len(messages)} turns; at most {_MOST_TURNS} are read", param="messages"
            )
        return [self._turn(Fields(one, f"messages.{place}")) for place, one in enumerate(messages)]

    def _turn(self, turn: Fields) -> dict[str, Any]:
        said, at = turn.text("role"), turn.param("role")
        if said not in ROLES:
            raise ApiError(f"{at} {quoted_argument(said)} is not served; give {', '.join(ROLES)}", param=at)
        role = ROLES[said]
        for name in ("tool_calls", "function_call"):
            if turn.raw(name):
                at = turn.param(name)
                raise ApiError(f"{at} is not served: this server calls no tools; leave it out", param=at)
        content = turn.raw("content")
        self.unread += turn.unread()
        if content is None and role == "assistant":
            return {"role": role, "content": ""}
        return {"role": role, "content": self._content(content, role, turn.param("content"))}

    def _content(self, content: object, role: str, at: str) -> Any:
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise ApiError(f"{at} must be text or a list of parts, not {kind_of(content)}", param=at)
        if not content:
            raise ApiError(f"{at} is an empty list; give at least one part", param=at)
        return [self._part(Fields(part, f"{at}.{place}"), role) for place, part in enumerate(content)]

    def _part(self, part: Fields, role: str) -> dict[str, str]:
        kind, at = part.text("type"), part.param("type")
        if kind == "text":
            text = part.text("text")
            if text is None:
                raise ApiError(f"{part.param('text')} is missing; give the text", param=part.param("text"))
            return {"type": "text", "text": text}
        if kind != "image_url":
            raise ApiError(f"{at} {quoted_argument(kind)} is not served; give text or image_url", param=at)
        if role != "user":
            raise ApiError(f"{part.param('image_url')}: only user turns may hold a picture", param=at)
        self._picture(part)
        return {"type": "image"}

    def _picture(self, part: Fields) -> None:
        given, at = part.raw("image_url"), part.param("image_url")
        if isinstance(given, str):
            self.pictures.append(PictureSource(given, at))
            self.details.append("auto")
            return
        image = Fields(given, at)
        url = image.text("url")
        if not url:
            raise ApiError(f"{image.param('url')} is missing; give a data: URL", param=image.param("url"))
        self.pictures.append(PictureSource(url, image.param("url")))
        self.details.append(image.choice("detail", DETAILS) or "auto")


def highest(details: Sequence[str]) -> str:
    """The detail of a request: the most that any of its pictures asks for."""
    return max(details, key=DETAILS.index, default="auto")
