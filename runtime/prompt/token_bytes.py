"""What single tokens stand for: their bytes, and their text."""

from __future__ import annotations

import re
from functools import lru_cache

from tokenizers import Tokenizer

from vtp.runtime.prompt.tokenizer import decoder_steps, failing_as

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD = "a"  # stands beside a token, so that the token's own spaces stay
_REMEMBERED = 4096


class TokenBytes:
    """The bytes of a tokenizer's tokens as they stand inside a text: a word's leading space included.

    A token of a byte-level vocabulary, or a byte token (`<0xE2>`), may hold part of a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        steps = decoder_steps(tokenizer)
        self._tokenizer = tokenizer
        self._added = {
            number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._spaces_follow = "BPEDecoder" in steps  # the end of a word is marked, not its beginning
        self._byte_level, self._byte_tokens = "ByteLevel" in steps, "ByteFallback" in steps
        self.of = lru_cache(_REMEMBERED)(self._of)

    def _of(self, token_id: int) -> bytes:
        """The bytes of a token; none for an id that the tokenizer does not have."""
        if (added := self._added.get(token_id)) is not None:
            return _utf8(added)
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_tokens and (byte := _BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if self._byte_level and all(letter in _BYTES for letter in piece):
            return bytes(_BYTES[letter] for letter in piece)
        return _utf8(self._inside(piece))

    def _inside(self, piece: str) -> str:
        """A token's text after another word."""
        decoder = self._tokenizer.decoder
        if decoder is None:  # words, with spaces between them
            return f" {piece}"
        after = [_WORD] if self._spaces_follow else []
        with failing_as("the model's tokenizer cannot decode the answer"):
            text = decoder.decode([_WORD, piece, *after])
        return text.removeprefix(_WORD).removesuffix("".join(after))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


def _byte_alphabet() -> dict[str, int]:
    """Letter -> byte of byte-level vocabularies: printable Latin-1 bytes are themselves, the others follow
    from U+0100 on (GPT-2's `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(0x100) if byte not in plain]
    shifted = {chr(0x100 + place): byte for place, byte in enumerate(rest)}
    return {**{chr(byte): byte for byte in plain}, **shifted}


_BYTES = _byte_alphabet()
