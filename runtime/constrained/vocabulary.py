"""A model's tokens as llguidance takes them: their bytes, which of them end an answer, which are control."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from vtp.engines.errors import VtpError
from vtp.runtime.constrained.errors import refused
from vtp.runtime.prompt.prompter import Prompter
from vtp.runtime.prompt.tokenizer import failing_as

if TYPE_CHECKING:
    from llguidance import LLTokenizer

__all__ = ["check_installed", "make_vocabulary"]

# An answer of this kind must be its tokens' bytes, one after the other.
_SIGNS = '{}[]":,.-0123456789eE+truefalsn'
_BEFORE = "\n"  # stands before a text that is encoded as a later part of an answer
_PROBE = '{"a b": ["x, y!", -1.5e3, "it\'s é 東 🙂"],\n  "c_d": null}'


@functools.cache
def check_installed() -> None:
    """VtpError, with what to do, where llguidance is not installed."""
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise VtpError(
            "response_format needs llguidance, which is not installed; run: pip install 'vtp-edge[serve]'"
        ) from error


class _Tokens:
    """What `llguidance.TokenizerWrapper` asks of a tokenizer."""

    def __init__(self, prompter: Prompter) -> None:
        tokenizer, spec = prompter.tokenizer, prompter.spec
        of = prompter.token_bytes.of
        added = tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        special |= {spec.image_token_id, *spec.placeholder_ids, *spec.eos_token_ids}
        count = max(tokenizer.get_vocab_size(with_added_tokens=True), *(number + 1 for number in special))
        self.tokens = [of(number) for number in range(count)]
        self.special_token_ids = sorted(special)
        self.eos_token_id = spec.eos_token_ids[0] if spec.eos_token_ids else spec.image_token_id
        self.bos_token_id = spec.bos_token_id
        self._encode = prompter.continued
        self._by_bytes = {
            text: number for number, text in enumerate(self.tokens) if text and number not in special
        }
        self._longest = max(map(len, self._by_bytes), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens of bytes that must come next: the tokenizer's own, if they stand for these bytes and no
        others (many put a space in front of a text), or else the longest that fit, one after the other."""
        raw = text.encode() if isinstance(text, str) else text
        ids = self._encode(_BEFORE, raw.decode("utf-8", errors="replace"))
        return ids if b"".join(self.tokens[number] for number in ids) == raw else self._greedy(raw)

    def _greedy(self, raw: bytes) -> list[int]:
        ids: list[int] = []
        while raw:
            sizes = range(min(self._longest, len(raw)), 0, -1)
            size = next((size for size in sizes if raw[:size] in self._by_bytes), 0)
            if not size:
                break  # what no token stands for cannot be written
            ids.append(self._by_bytes[raw[:size]])
            raw = raw[size:]
        return ids


def make_vocabulary(prompter: Prompter) -> LLTokenizer:
    """The tokens of a bundle's tokenizer. FormatError where its text is not its tokens' bytes."""
    from llguidance import LLTokenizer, TokenizerWrapper

    _check_bytewise(prompter)
    tokens = _Tokens(prompter)
    if missing := [sign for sign in _SIGNS if not tokens(sign)]:
        raise refused(
            f"this model's tokenizer has no token for {missing[0]}, so it writes no JSON; "
            "ask for another form in the prompt"
        )
    ends = list(prompter.spec.eos_token_ids) or [tokens.eos_token_id]
    return LLTokenizer(TokenizerWrapper(tokens), n_vocab=len(tokens.tokens), eos_token=ends)


def _check_bytewise(prompter: Prompter) -> None:
    ids = prompter.continued("", _PROBE)
    with failing_as("the model's tokenizer cannot decode the answer"):
        text = prompter.tokenizer.decode(ids, skip_special_tokens=False)
    joined = b"".join(map(prompter.token_bytes.of, ids)).decode("utf-8", errors="replace")
    if joined not in (text, f" {text}") or not prompter.decoding.grows:
        raise refused(
            "this model's tokenizer changes the text between tokens, so that no answer can "
            "be held to a form; ask for it in the prompt"
        )
