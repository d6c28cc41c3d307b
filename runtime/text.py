"""Between words and token ids: chat template, prompt ids, streaming detokenisation, stop strings.

Equal to transformers' processors and tokenizers (`apply_chat_template(tokenize=True)` and `decode`), without
them. Knows nothing about graphs: a `Prompt` says where the image goes, and another module puts it there.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from tokenizers import Tokenizer

from vtp.engines.errors import UsageError, VtpError
from vtp.runtime.arguments import shown

__all__ = ["Detokenizer", "Prompt", "Prompter", "StopStrings", "TextSpec"]

#: One turn of a conversation: {"role": ..., "content": text or list of {"type": ...} parts}.
Message = Mapping[str, Any]

_ROLES = ("system", "user", "assistant")
_WORDS = {"image": "picture", "video": "video"}  # what users call each kind of media


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
        if self.media not in _WORDS:
            raise VtpError(f"the text section's media is {self.media!r}; known: {', '.join(_WORDS)}")
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
    ASSISTANT:", and longer conversations are refused. A tokenizer.json that cannot be read, and one in which
    the image token is not a single token with the id of `spec`, raise `VtpError`.
    """

    def __init__(self, spec: TextSpec, tokenizer_json: str | Path) -> None:
        self.spec = spec
        self.tokenizer = _load_tokenizer(Path(tokenizer_json))
        found = self.tokenizer.token_to_id(spec.image_token)
        if found != spec.image_token_id:
            raise VtpError(
                f"the tokenizer gives image token '{spec.image_token}' the id {found}, the bundle says "
                f"{spec.image_token_id}; export it again"
            )
        self.decoding = _Decoding.of(self.tokenizer)
        self._reserved = _reserved_texts(spec, self.tokenizer)
        self._template = None if spec.chat_template is None else _compile(spec.chat_template)

    def messages_for(self, prompt: str, images: int = 1) -> list[dict[str, Any]]:
        """One user turn: the images, then `prompt`. A prompt that is empty or blank is a `UsageError`."""
        if not isinstance(prompt, str):
            raise UsageError(f"a prompt must be text, not {type(prompt).__name__}")
        if not prompt.strip():
            raise UsageError(f"the prompt is empty; ask something about the {_WORDS[self.spec.media]}")
        marks = [{"type": self.spec.media} for _ in range(images)]
        return [{"role": "user", "content": [*marks, {"type": "text", "text": prompt}]}]

    def encode(self, messages: Sequence[Message], images: int = 1) -> Prompt:
        """Render and tokenize a conversation that ends with the user and has `images` images, in user turns.

        Raises `UsageError` for messages of another form, for placeholder or other special-token text in them,
        and where the template refuses them.
        """
        checked = _check_messages(messages, images, self.spec.media)
        for message in checked:
            self._refuse_reserved(message)
        text = self._render(checked)
        _check_rendered(text, checked[-1])
        if self.spec.image_mark:
            text = text.replace(self.spec.image_mark, self.spec.image_text)
        ids = self.tokenizer.encode(text, add_special_tokens=not self._has_bos(text)).ids
        return self._place_images(text, ids, images)

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
        except Exception as error:  # a template is a program: it may raise anything
            raise UsageError(
                f"the model's chat template refuses these messages: {_first_line(error)}"
            ) from error

    def _render_plain(self, messages: list[dict[str, Any]]) -> str:
        if len(messages) != 1:
            raise UsageError(
                "this model has no chat template, so it takes one user turn; ask a single question"
            )
        images = sum(part["type"] == self.spec.media for part in _parts(messages[0]))
        marks = f"{self.spec.image_token}\n" * images
        return f"USER: {marks}{_joined_text(messages[0])} ASSISTANT:"

    def _refuse_reserved(self, message: dict[str, Any]) -> None:
        text = _joined_text(message)
        for reserved in self._reserved:
            if reserved in text:
                raise UsageError(
                    f"the {message['role']}'s text holds '{reserved}', a control token of this model; "
                    f"leave it out (the {_WORDS[self.spec.media]}'s place is added for you)"
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


def _load_tokenizer(path: Path) -> Tokenizer:
    """Read tokenizer.json; saved padding and truncation are switched off, as they would change prompts."""
    if not path.is_file():
        raise VtpError(f"no tokenizer at '{path}'; export the bundle again")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise VtpError(f"'{path}' is not a readable tokenizer.json: {_first_line(error)}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _special_texts(tokenizer: Tokenizer) -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}


def _reserved_texts(spec: TextSpec, tokenizer: Tokenizer) -> list[str]:
    """Texts that would turn into control tokens inside a prompt, longest first."""
    texts = (
        _special_texts(tokenizer) | {spec.image_token, spec.image_mark} | set(spec.special_tokens.values())
    )
    return sorted((text for text in texts if text), key=lambda text: (-len(text), text))


def _check_messages(messages: object, wanted: int, media: str) -> list[dict[str, Any]]:
    """Return plain copies of well-formed messages; the first thing that is wrong becomes one line."""
    word = _WORDS[media]
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(f"messages must be a list of turns, not {type(messages).__name__}")
    if not messages:
        raise UsageError("messages is empty; give at least one user turn")
    checked = [_check_message(message, index, media) for index, message in enumerate(messages)]
    if checked[-1]["role"] != "user":
        raise UsageError(
            f"the last message is the {checked[-1]['role']}'s; end with a user turn to be answered"
        )
    images = sum(part["type"] == media for message in checked for part in _parts(message))
    if images != wanted:
        given = f"1 {word} is" if wanted == 1 else f"{wanted} {word}s are"
        raise UsageError(
            f'the messages hold {images} {media}s, and {given} given; put one {{"type": "{media}"}} for each '
            "in the user turns"
        )
    if not any(_joined_text(message).strip() for message in checked if message["role"] == "user"):
        raise UsageError(f"the prompt is empty; ask something about the {word}")
    return checked


def _check_message(message: object, index: int, media: str) -> dict[str, Any]:
    where = f"message {index}"
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        given = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise UsageError(f"{where} must have the keys role and content, and no others, not {given}")
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise UsageError(f"{where} has the role {role!r}; choose {', '.join(_ROLES)}")
    if isinstance(content, str):
        return {"role": role, "content": str.__str__(content)}
    if not isinstance(content, list | tuple) or not content:
        raise UsageError(f"{where}'s content must be text or a list of parts, not {content!r:.60}")
    return {"role": role, "content": [_check_part(part, role, where, media) for part in content]}


def _check_part(part: object, role: str, where: str, media: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part, Mapping):
        if set(part) == {"type", "text"} and isinstance(part["text"], str):
            return {"type": "text", "text": str.__str__(part["text"])}
        raise UsageError(f'{where} has a text part of another form than {{"type": "text", "text": "..."}}')
    if kind == media and isinstance(part, Mapping):
        if set(part) != {"type"}:
            raise UsageError(
                f"{where}: give the {_WORDS[media]} as image=, and mark its place by "
                f'{{"type": "{media}"}} alone'
            )
        if role != "user":
            raise UsageError(
                f"{where} puts a {_WORDS[media]} into the {role}'s turn; only user turns may hold one"
            )
        return {"type": media}
    raise UsageError(f"{where} has a part of type {kind!r}; choose text or {media}")


def _parts(message: dict[str, Any]) -> list[dict[str, str]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _joined_text(message: dict[str, Any]) -> str:
    """All text of one turn in one string, so that a token split over two parts is seen too."""
    return "".join(part["text"] for part in _parts(message) if part["type"] == "text")


def _check_rendered(text: str, last: dict[str, Any]) -> None:
    """Refuse a template that lost the question, as those for parts do with plain text, in silence."""
    for part in _parts(last):
        if part["type"] == "text" and part["text"].strip() not in text:
            raise UsageError(
                "the model's chat template left out the user's text; give the content as a list of parts, "
                'such as [{"type": "text", "text": "..."}]'
            )


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %}, which marks words for training; rendered as is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return caller()


class _TemplateNamespace(Namespace):
    """Jinja's namespace without underscore names, which could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not store the underscore-prefixed attribute {name!r}")


class _TemplateDict:
    """`dict` for templates: callable, with `fromkeys`, and no way to the type's other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _compile(source: str) -> Template:
    """Compile a chat template in the sandbox that transformers sets up for it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda format: datetime.now().strftime(format),
        dict=_TemplateDict(),
        namespace=_TemplateNamespace,
    )
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise VtpError(f"the model's chat template does not compile: {_first_line(error)}") from error


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters; prompts want them as they are."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Decoders whose text for a sequence only ever grows by what the next token adds.
_GROWING = {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Replace", "Metaspace", "WordPiece", "BPEDecoder"}


@dataclass(frozen=True)
class _Decoding:
    """How a tokenizer decodes: read once, since vocabularies may have thousands of added tokens."""

    special: frozenset[str]
    byte_tokens: bool
    grows: bool  # more tokens only ever add to the text

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Decoding:
        steps = _decoder_steps(tokenizer)
        return cls(frozenset(_special_texts(tokenizer)), "ByteFallback" in steps, _text_grows(steps))


class Detokenizer:
    """Streams an answer's text; all pieces together equal `tokenizer.decode(ids, skip_special_tokens=True)`.

    Only a window of the last tokens is decoded for each new one, so an answer of n tokens costs O(n). A run
    of byte tokens (`<0xE2>`) is held back until it ends, since its decoding depends on the whole run. A
    decoder whose text could still change (CTC, a replacement across tokens) gives everything at `finish`.
    """

    _WINDOW = 16  # tokens decoded at most, apart from runs of byte tokens
    _CONTEXT = 8  # tokens kept when it is full: more than the 3 bytes that a cut character can reach back

    def __init__(self, source: Prompter | Tokenizer) -> None:
        self._tokenizer = source.tokenizer if isinstance(source, Prompter) else source
        self._decoding = source.decoding if isinstance(source, Prompter) else _Decoding.of(source)
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were handed out

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is certain now, "" while a character is incomplete."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._decoding.special:
            return ""
        self._window.append(token_id)
        if not self._decoding.grows or (self._decoding.byte_tokens and _BYTE_TOKEN.fullmatch(token)):
            return ""
        text = _certain(self._decode())
        piece, self._sent = text[self._sent :], max(self._sent, len(text))
        if len(self._window) >= self._WINDOW:
            self._window = self._window[-self._CONTEXT :]
            self._sent = len(_certain(self._decode()))
        return piece

    def finish(self) -> str:
        """Return what was held back, and start afresh."""
        piece = self._decode()[self._sent :]
        self._window, self._sent = [], 0
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)


def _certain(text: str) -> str:
    """All but a last character that may be the beginning of one whose other bytes are still to come."""
    return text[:-1] if text.endswith(_REPLACEMENT) else text


def _decoder_steps(tokenizer: Tokenizer) -> list[str]:
    """The types of the tokenizer's decoders, in their order."""
    if tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.decoder.__getstate__())
    return [step["type"] for step in state.get("decoders", [state])]


def _text_grows(steps: Iterable[str]) -> bool:
    """Whether more tokens only ever add to the text (apart from an incomplete last character)."""
    fused = False
    for step in steps:
        if step not in _GROWING or (step == "Replace" and fused):
            return False
        fused = fused or step in ("Fuse", "ByteLevel")
    return True


class StopStrings:
    """Cuts a stream of text at the first of some strings, however the pieces split it.

    The string that is complete first wins, and of those the one that began first; it is not part of the
    result. Empty stop strings are a `UsageError`.
    """

    def __init__(self, stops: str | Sequence[str] = ()) -> None:
        if not isinstance(stops, str | Sequence):
            raise UsageError(f"stop strings must be text or a list of texts, not {type(stops).__name__}")
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise UsageError(f"a stop string must be text of at least one character, not {shown(stop)}")
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Add text; return what cannot be part of a stop string. After the cut, `hit` is set."""
        if self.hit:
            return ""
        text = self._held + text
        cut = self._find(text)
        if cut is not None:
            self._held, self.hit = "", True
            return text[:cut]
        keep = self._open_length(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back: the answer ended, so no stop string can complete any more."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int | None:
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        return min(found)[1] if found else None

    def _open_length(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self._stops):
                return length
        return 0
