"""Streamed text equals what transformers decodes of the same ids, at a cost that does not grow."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vtp.runtime.prompt.prompter import Detokenizer

from .tokenizer_kinds import FAST, GROWING, TOKENIZERS


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


def expected_text(name: str, ids: list[int]) -> str:
    return str(FAST[name].decode(ids, skip_special_tokens=True))


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), data=st.data())
def test_streamed_text_of_any_ids_equals_transformers(name: str, data: st.DataObject) -> None:
    size = TOKENIZERS[name].get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 1), max_size=60))
    assert "".join(streamed(TOKENIZERS[name], ids)) == expected_text(name, ids)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), text=st.text(max_size=60))
def test_streamed_text_of_any_words_equals_transformers(name: str, text: str) -> None:
    ids = TOKENIZERS[name].encode(text).ids
    assert "".join(streamed(TOKENIZERS[name], ids)) == expected_text(name, ids)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.sampled_from([0x20, 0x41, 0x80, 0xBF, 0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0xFF]))
)
def test_broken_bytes_stream_as_they_decode(values: list[int]) -> None:
    """Cut, stray and overlong bytes, one token each, in both ways that tokenizers spell bytes."""
    alphabet = byte_spelling()
    for name, tokens in (
        ("byte_level", [alphabet[v] for v in values]),
        ("llama", [f"<0x{v:02X}>" for v in values]),
    ):
        found = [TOKENIZERS[name].token_to_id(token) for token in tokens]
        ids = [token for token in found if token is not None]
        assert len(ids) == len(values)
        assert "".join(streamed(TOKENIZERS[name], ids)) == expected_text(name, ids)


def byte_spelling() -> dict[int, str]:
    """GPT-2's character for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in plain]
    return {value: chr(value) for value in plain} | {value: chr(256 + at) for at, value in enumerate(others)}


@pytest.mark.parametrize("name", GROWING)
def test_text_comes_piece_by_piece(name: str) -> None:
    ids = TOKENIZERS[name].encode("what color is the star ? the star is red").ids
    pieces = streamed(TOKENIZERS[name], ids)
    assert sum(bool(piece) for piece in pieces) >= 8
    assert pieces[-1] == ""


def test_a_split_character_waits_for_its_last_byte() -> None:
    for name, text in (("byte_level", "a🙂b"), ("llama", "a🙂b")):
        ids = TOKENIZERS[name].encode(text).ids
        pieces = streamed(TOKENIZERS[name], ids)
        assert len(ids) > len(text)
        assert "�" not in "".join(pieces) and any("🙂" in piece for piece in pieces)


def test_a_decoder_that_rewrites_gives_all_at_the_end() -> None:
    ids = TOKENIZERS["rewriting"].encode("it is this").ids
    pieces = streamed(TOKENIZERS["rewriting"], ids)
    assert pieces[-1] == "it IS thIS" and not any(pieces[:-1])


class CountingTokenizer:
    """Passes everything on, and counts the tokens that were decoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


@pytest.mark.parametrize("name", GROWING)
def test_long_answers_cost_no_more_per_token(name: str) -> None:
    size = TOKENIZERS[name].get_vocab_size()
    chance = np.random.default_rng(5)
    answers = [chance.integers(5, size, 3000).tolist(), [int(chance.integers(5, size))] * 3000]
    if name == "byte_level":
        answers.append([TOKENIZERS[name].token_to_id(byte_spelling()[0xFF])] * 3000)
    if name == "llama":
        answers.append([TOKENIZERS[name].token_to_id("<0xE2>")] * 3000)
    for ids in answers:
        counting = CountingTokenizer(TOKENIZERS[name])
        text = "".join(streamed(counting, ids))  # type: ignore[arg-type]
        assert text == expected_text(name, ids)
        assert len(ids) <= counting.decoded <= 20 * len(ids)


def test_a_detokenizer_starts_afresh_after_finish() -> None:
    detokenizer = Detokenizer(TOKENIZERS["llama"])
    ids = TOKENIZERS["llama"].encode("the star").ids
    for _ in range(2):
        assert "".join([*map(detokenizer.push, ids), detokenizer.finish()]) == "the star"
