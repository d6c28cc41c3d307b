"""The answer's text while it is written: streaming detokenisation and stop strings.

Equal to transformers' `tokenizer.decode` of all ids at once, piece by piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from vtp.engines.errors import UsageError, VtpError, quoted_argument
from vtp.runtime.prompt.messages import check_text
from vtp.runtime.prompt.tokenizer import LONGEST_PIECE, decoder_steps, failing_as, special_texts

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MOST_STOPS = 256
_STOPS_LENGTH = 2**14  # characters of all of them: each is held against the end of the text after every token
# Decoders whose text for a sequence only ever grows by what the next token adds.
_GROWING = {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Replace", "Metaspace", "WordPiece", "BPEDecoder"}


@dataclass(frozen=True)
class Decoding:
    """How a tokenizer decodes: read once, since vocabularies may have thousands of added tokens."""

    special: frozenset[str]
    byte_tokens: bool
    grows: bool  # more tokens only ever add to the text

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Decoding:
        steps = decoder_steps(tokenizer)
        return cls(frozenset(special_texts(tokenizer)), "ByteFallback" in steps, _text_grows(steps))


class Detokenizer:
    """Streams an answer's text; all pieces together equal `tokenizer.decode(ids, skip_special_tokens)`.

    Only a window of the last tokens is decoded for each new one, so an answer of n tokens costs O(n). A run
    of byte tokens (`<0xE2>`) is held back until it ends, since its decoding depends on the whole run. A
    decoder whose text could still change (CTC, a replacement across tokens) gives everything at `finish`.
    """

    _WINDOW = 16  # tokens decoded at most, apart from runs of byte tokens
    _CONTEXT = 8  # tokens kept when it is full: more than the 3 bytes that a cut character can reach back

    def __init__(
        self, tokenizer: Tokenizer, decoding: Decoding | None = None, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._decoding = decoding or Decoding.of(tokenizer)
        self._skipped = self._decoding.special if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were handed out

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is certain now, "" while a character is incomplete."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._skipped:
            return ""
        if len(token) > LONGEST_PIECE:
            raise VtpError(f"token {token_id} has {len(token)} characters (limit: {LONGEST_PIECE})")
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
        with failing_as("the model's tokenizer cannot decode the answer"):
            return self._tokenizer.decode(self._window, skip_special_tokens=False)


def _certain(text: str) -> str:
    """All but a last character that may be the beginning of one whose other bytes are still to come."""
    return text[:-1] if text.endswith(_REPLACEMENT) else text


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
    result. Empty stop strings are a `UsageError`, and so are more than can be looked for after every token.
    """

    def __init__(self, stops: str | Sequence[str] = ()) -> None:
        if not isinstance(stops, str | Sequence) or isinstance(stops, bytes | bytearray):
            raise UsageError(f"stop strings must be text or a list of texts, not {type(stops).__name__}")
        if not isinstance(stops, str) and len(stops) > _MOST_STOPS:
            raise UsageError(f"{len(stops)} stop strings are given; give at most {_MOST_STOPS}")
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise UsageError(
                    f"a stop string must be text of at least one character, not {quoted_argument(stop)}"
                )
            check_text(stop, "a stop string")
        if (length := sum(map(len, self._stops))) > _STOPS_LENGTH:
            raise UsageError(
                f"the stop strings have {length} characters together; give at most {_STOPS_LENGTH}"
            )
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
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
