"""The bytes of tokens, joined, are the text that the tokenizer decodes them to, characters in pieces too."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtp.runtime.prompt.token_bytes import TokenBytes

from .tokenizer_kinds import TOKENIZERS

BYTE_EXACT = ["byte_level", "byte_level_prefix", "llama", "metaspace_first", "metaspace_never"]
TEXTS = ["what color is the star ?", "naïve 東京 🙂", " two  spaces", "a\nb\tc", "</s> <image>x"]


def joined(name: str, text: str) -> tuple[bytes, str]:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    of = TokenBytes(tokenizer).of
    return b"".join(of(number) for number in ids), tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", BYTE_EXACT)
def test_joined_they_are_the_text(name: str, text: str) -> None:
    raw, decoded = joined(name, text)
    assert raw.decode() in (decoded, f" {decoded}")


@pytest.mark.parametrize("name", ["wordpiece", "words_only", "end_of_word"])
def test_words_keep_their_spaces(name: str) -> None:
    raw, decoded = joined(name, "what color is the star ?")
    assert (
        raw.decode().strip()
        == decoded
        == TOKENIZERS[name].decode(
            TOKENIZERS[name].encode("what color is the star ?", add_special_tokens=False).ids
        )
    )


@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=30), name=st.sampled_from(["byte_level", "llama"]))
def test_any_text(text: str, name: str) -> None:
    raw, decoded = joined(name, text)
    assert raw.decode("utf-8", errors="replace") in (decoded, f" {decoded}")


def test_parts_of_characters_are_their_bytes() -> None:
    for name in ("byte_level", "llama"):
        tokenizer = TOKENIZERS[name]
        ids = tokenizer.encode("\U000f1234", add_special_tokens=False).ids
        parts = [TokenBytes(tokenizer).of(number) for number in ids]
        assert sum(len(part) == 1 for part in parts) >= 4
        assert b"".join(parts).strip() == "\U000f1234".encode()


def test_an_unknown_id_has_no_bytes() -> None:
    assert TokenBytes(TOKENIZERS["llama"]).of(10**6) == b""
