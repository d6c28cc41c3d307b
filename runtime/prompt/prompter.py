"""Between words and token ids: chat template and prompt ids.

Equal to transformers' processors and tokenizers (`apply_chat_template(tokenize=True)` and `decode`), without
them. Knows nothing about graphs: a `Prompt` says where the image goes, and another module puts it there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vtp.engines.errors import RequestError, UsageError, VtpError
from vtp.runtime.prompt.detokenizer import Decoding, Detokenizer, StopStrings
from vtp.runtime.prompt.messages import (
    MEDIA,
    Message,
    check_kept,
    check_messages,
    check_text,
    joined_text,
    parts_of,
    shape_of,
)
from vtp.runtime.prompt.template import ChatTemplate, TemplateLimit, TemplateRefusal, first_line
from vtp.runtime.prompt.token_bytes import TokenBytes
from vtp.runtime.prompt.tokenizer import CheckedTokenizer, special_texts

__all__ = ["Detokenizer", "Prompt", "PromptTooLong", "Prompter", "StopStrings", "TextSpec"]

_MOST_TOKENS = 2**20  # of a prompt, where nobody says how many fit
_FEWEST_CHARACTERS = 2**16  # of a text that is encoded to see how long it is, however little fits
_COMPOSED = 4  # characters that a normalizer may make one of
_SHAPES = 64  # kinds of conversation whose rendering is remembered as complete


class PromptTooLong(VtpError):
    """A prompt leaves no room for an answer in the bundle's cache; the text has both numbers."""


@dataclass(frozen=True)
class TextSpec:
    """What a model expects of its prompt; every field is plain JSON.

    chat_template: Jinja source, or None for LLaVA's plain form (see `Prompter`). image_token: the text by
    which the template marks the image, one token of the tokenizer, with id image_token_id. placeholder_ids:
    the ids that replace that token in `input_ids`: image_token_id once for every run of visual tokens, and
    the marks around and between the runs, which are text. special_tokens: the template's variables, such as
    {"bos_token": "<s>"}. image_mark: what the template writes for an image where that is another text;
    image_text, which holds image_token once, takes its place before the text is tokenized. media: "image",
    or "video" where all that is said of images here is meant of videos, as messages call their parts.
    """

    chat_template: str | None
    image_token: str
    image_token_id: int
    placeholder_ids: tuple[int, ...]
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    special_tokens: dict[str, str] = field(default_factory=dict)
    image_mark: str = ""
    image_text: str = ""
    media: str = "image"

    def __post_init__(self) -> None:
        object.__setattr__(self, "placeholder_ids", tuple(self.placeholder_ids))
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        if not self.placeholder_ids:
            raise VtpError("the text section's placeholder_ids is empty; an image needs at least one id")
        if self.image_token_id not in self.placeholder_ids:
            raise VtpError("the text section's placeholder_ids lacks image_token_id; export the bundle again")
        if self.media not in MEDIA:
            raise VtpError(f"the text section's media is {self.media!r}; known: {', '.join(MEDIA)}")
        if not self.image_token:
            raise VtpError("the text section's image_token is empty; name the token that marks an image")

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values that `from_json` takes back."""
        lists = {"placeholder_ids": list(self.placeholder_ids), "eos_token_ids": list(self.eos_token_ids)}
        return {**dataclasses.asdict(self), **lists}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TextSpec:
        """Read `to_json`'s dictionary; raises `VtpError` for missing and for unknown keys."""
        fields = dataclasses.fields(cls)
        if unknown := sorted(set(data) - {entry.name for entry in fields}):
            raise VtpError(f"the bundle's text section has unknown keys {unknown}; export it again")
        if missing := [entry.name for entry in fields[:4] if entry.name not in data]:
            raise VtpError(f"the bundle's text section lacks {missing}; export it again")
        return cls(**data)


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt: its text, its ids [S], the index in them of every image's first id that stands for
    visual tokens, and how many of the ids are text."""

    text: str
    ids: list[int]
    image_starts: tuple[int, ...]
    text_tokens: int

    @property
    def image_start(self) -> int:
        """The first image's."""
        return self.image_starts[0]


class Prompter:
    """Turns a question or a conversation, with its images in it, into a `Prompt`.

    Without a chat template a single user turn becomes LLaVA's plain form, "USER: <image>\\n{question}
    ASSISTANT:", and longer conversations are refused. `most_tokens` is what a prompt may have: texts that
    cannot fit are refused (`PromptTooLong`) before they are encoded. A template that does not compile, a
    tokenizer.json that cannot be read or used, and one in which the image token is not a single token with
    the id of `spec`, raise `VtpError`.
    """

    def __init__(self, spec: TextSpec, tokenizer_json: str | Path, most_tokens: int = _MOST_TOKENS) -> None:
        self.spec = spec
        self._words = CheckedTokenizer(Path(tokenizer_json))
        self._most = most_tokens
        found = self.tokenizer.token_to_id(spec.image_token)
        if found != spec.image_token_id:
            raise VtpError(
                f"the tokenizer gives image token '{spec.image_token}' the id {found}, the bundle says "
                f"{spec.image_token_id}; export it again"
            )
        self.decoding = Decoding.of(self.tokenizer)
        self._places = _longest_first({spec.image_token, spec.image_mark})
        self._reserved = _longest_first(
            special_texts(self.tokenizer) | set(self._places) | set(spec.special_tokens.values())
        )
        self._template = None if spec.chat_template is None else ChatTemplate(spec.chat_template)
        self._complete: dict[tuple[Any, ...], None] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, without padding and truncation."""
        return self._words.tokenizer

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """What single tokens of the bundle's tokenizer stand for."""
        return TokenBytes(self.tokenizer)

    def messages_for(self, prompt: str, images: int = 1) -> list[dict[str, Any]]:
        """One user turn: the images, then `prompt`. A prompt that is empty or blank is a `UsageError`."""
        if not isinstance(prompt, str):
            raise UsageError(f"a prompt must be text, not {type(prompt).__name__}")
        check_text(prompt, "the prompt")
        if not prompt.strip():
            raise UsageError(f"the prompt is empty; ask something about the {MEDIA[self.spec.media]}")
        marks = [{"type": self.spec.media} for _ in range(images)]
        return [{"role": "user", "content": [*marks, {"type": "text", "text": prompt}]}]

    def encode(
        self, messages: Sequence[Message], images: int = 1, allow_special_tokens: bool = False
    ) -> Prompt:
        """Render and tokenize a conversation that ends with the user and has `images` images, in user turns.

        allow_special_tokens  let the texts hold the model's control tokens, which then mean what they mean
                              in transformers' prompts; the image token never

        Raises `UsageError` for messages of another form, for placeholder or other special-token text in them,
        and where the template refuses them or leaves out words; `VtpError` where it takes no end.
        """
        checked = check_messages(messages, images, self.spec.media, self._most)
        self._check_length(sum(len(joined_text(message)) for message in checked))
        for message in checked:
            self._refuse(message, self._places if allow_special_tokens else self._reserved)
        text = self._render(checked)
        self._check_kept(checked, text)
        if self.spec.image_mark:
            text = text.replace(self.spec.image_mark, self.spec.image_text)
        self._check_length(len(text))
        ids = self._words.encode(text, add_special_tokens=not self._has_bos(text))
        return self._place_images(text, ids, images)

    def continued(self, before: str, text: str) -> list[int]:
        """The ids that a text adds after another; none where it changes those of the other."""
        own = self._words.encode(before, add_special_tokens=False)
        ids = self._words.encode(before + text, add_special_tokens=False)
        return ids[len(own) :] if ids[: len(own)] == own else []

    def check(self) -> None:
        """Try a question. Raises `VtpError` for a template and a tokenizer that no prompt can go through."""
        try:
            self.encode(self.messages_for("Describe the picture."))
        except VtpError as error:  # what would be a user's mistake is the model's here
            raise VtpError(f"this model cannot be prompted: {error}") from error

    def _check_length(self, characters: int) -> None:
        """Refuse text that must have more tokens than fit: encoding it may take minutes."""
        if characters <= _FEWEST_CHARACTERS:
            return
        most = max(_FEWEST_CHARACTERS, self._most * self._words.longest * _COMPOSED)
        if characters > most:
            raise PromptTooLong(
                f"the prompt has {characters} characters, more than the {most} that {self._most} tokens can "
                "hold; shorten it, or export with a larger --max-length"
            )

    def _has_bos(self, text: str) -> bool:
        """Whether BOS is there already: at the start, or right after the images at the start."""
        bos = self.spec.special_tokens.get("bos_token")
        while text.startswith(self.spec.image_token):
            text = text.removeprefix(self.spec.image_token)
        return bos is not None and text.startswith(bos)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        if self._template is None:
            return self._render_plain(messages)
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.spec.special_tokens,
            )
        except TemplateLimit as error:
            raise VtpError(
                f"the model's chat template is refused: {first_line(error)}; use another model"
            ) from error
        except Exception as error:  # a template is a program: it may raise anything
            kind = RequestError if isinstance(error, TemplateRefusal) else UsageError
            raise kind(f"the model's chat template refuses these messages: {first_line(error)}") from error

    def _check_kept(self, messages: list[dict[str, Any]], text: str) -> None:
        """Refuse a template that leaves out words; what it does to a kind of conversation is tried once."""
        shape = shape_of(messages)
        check_kept(messages, text, None if shape in self._complete else self._render)
        if len(self._complete) >= _SHAPES:
            self._complete.clear()
        self._complete[shape] = None

    def _render_plain(self, messages: list[dict[str, Any]]) -> str:
        if len(messages) != 1:
            raise UsageError(
                "this model has no chat template, so it takes one user turn; ask a single question"
            )
        images = sum(part["type"] == self.spec.media for part in parts_of(messages[0]))
        marks = f"{self.spec.image_token}\n" * images
        return f"USER: {marks}{joined_text(messages[0])} ASSISTANT:"

    def _refuse(self, message: dict[str, Any], reserved: Sequence[str]) -> None:
        text = joined_text(message)
        for token in reserved:
            if token in text:
                raise RequestError(
                    f"the {message['role']}'s text holds '{token}', a control token of this model; "
                    f"leave it out (the {MEDIA[self.spec.media]}'s place is added for you)"
                    + ("" if token in self._places else ", or allow it: allow_special_tokens")
                )

    def _place_images(self, text: str, ids: list[int], images: int) -> Prompt:
        count = ids.count(self.spec.image_token_id)
        if count != images:
            raise VtpError(
                f"the chat template put {count} image tokens '{self.spec.image_token}' into the prompt, "
                f"not {images}; check the template of the model"
            )
        wide: list[int] = []
        starts: list[int] = []
        block = self.spec.placeholder_ids
        first, runs = block.index(self.spec.image_token_id), block.count(self.spec.image_token_id)
        for token in ids:
            if token == self.spec.image_token_id:
                starts.append(len(wide) + first)
                wide += block
            else:
                wide.append(token)
        return Prompt(text, wide, tuple(starts), len(wide) - images * runs)


def _longest_first(texts: set[str]) -> list[str]:
    """Texts that would turn into control tokens inside a prompt, longest first."""
    return sorted((text for text in texts if text), key=lambda text: (-len(text), text))
