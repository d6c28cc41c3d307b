"""A bundle's tokenizer.json, read and tried before it is trusted with a prompt.

It comes with its model, from anyone: what it does to text is bounded by its parts as they are declared, and
its failures, panics of its Rust code among them, are one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vtp.engines.errors import VtpError
from vtp.runtime.prompt.panics import without_panic_lines
from vtp.runtime.prompt.template import first_line

LARGEST = 2**28  # bytes of a tokenizer.json; real ones have up to 40 MB
LONGEST_TOKEN = 512  # characters that count, when a text is judged by its length alone; real ones have 256
LONGEST_PIECE = 2**14  # characters that one token may add to an answer
_GROWTH = 64  # times that replacements may lengthen a text
_INSERTED = 2**10  # characters that may be put in front of a text
_LONGEST_WORD = 10_000  # characters that a WordPiece model may look at in one piece: it is quadratic
# Letters, spaces, line ends, digits, marks, signs of several planes, and two that no vocabulary has.
PROBE = "Describe  it:\n\n1/2 naïve café, 東京 🙂 \u0301\t\U000f1234\ue123 <|x|>"


class CheckedTokenizer:
    """Turns text into ids and back. Raises `VtpError` for a file that cannot do so."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = _read(path)
        name = f"'{path}'"
        with failing_as(f"{name} is not a usable tokenizer.json"), without_panic_lines():
            _check_growth(_steps(self.tokenizer.normalizer, "normalizers"), "normalizer")
            _check_growth(_steps(self.tokenizer.decoder, "decoders"), "decoder")
            _check_model(self.tokenizer.model)
            ids = self.tokenizer.encode(PROBE).ids
            self.tokenizer.decode(ids, skip_special_tokens=False)

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token, as far as they count."""
        return min(LONGEST_TOKEN, max(map(len, self.tokenizer.get_vocab()), default=1))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text. Raises `VtpError` where the tokenizer cannot encode it."""
        with failing_as("the model's tokenizer cannot encode the prompt"), without_panic_lines():
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Any failure inside as a `VtpError` of one line; a panic of the tokenizers library is no `Exception`."""
    try:
        yield
    except VtpError:
        raise
    except Exception as error:
        raise VtpError(f"{what}: {first_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise VtpError(f"{what}: {first_line(error)}") from error


def special_texts(tokenizer: Tokenizer) -> set[str]:
    """Texts of the tokens that are marked as special."""
    return {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}


def decoder_steps(tokenizer: Tokenizer) -> list[str]:
    """The types of the tokenizer's decoders, in their order."""
    return [step["type"] for step in _steps(tokenizer.decoder, "decoders")]


def _read(path: Path) -> Tokenizer:
    """Read tokenizer.json; saved padding and truncation are switched off, as they would change prompts.

    So is the model's cache of words: it is kept for each thread and tokenizer, and outlives the tokenizer
    (5 KB for each load of a bundle); without it, a prompt of 18,000 tokens takes as long.
    """
    if not path.is_file():
        raise VtpError(f"no tokenizer at '{path}'; export the bundle again")
    if (size := path.stat().st_size) > LARGEST:
        raise VtpError(f"'{path}' has {size} bytes (limit: {LARGEST}); refuse this bundle")
    with failing_as(f"'{path}' is not a readable tokenizer.json"), without_panic_lines():
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if resize := getattr(tokenizer.model, "_resize_cache", None):  # BPE and Unigram have one
            resize(0)
    return tokenizer


def _steps(part: Any, several: str) -> list[Mapping[str, Any]]:
    """The settings of a normalizer or decoder, or of those that it holds in a sequence, however deep."""
    if part is None:
        return []
    found: list[Mapping[str, Any]] = []
    pending = [json.loads(part.__getstate__())]
    while pending:
        step = pending.pop(0)
        inner = step.get(several) if step.get("type") == "Sequence" else None
        if inner is None:
            found.append(step)
        else:
            pending = [*inner, *pending]
    return found


def _check_growth(steps: list[Mapping[str, Any]], what: str) -> None:
    """Refuse replacements that make a long text of a short one, together or alone."""
    growth = 1.0
    for step in steps:
        if step.get("type") == "Replace":
            growth *= _growth(step["pattern"], len(step["content"]))
        elif len(step.get("prepend") or "") > _INSERTED:
            growth = float("inf")
    if growth > _GROWTH:
        raise VtpError(
            f"the tokenizer's {what} lengthens a text by more than {_GROWTH} times; refuse this model"
        )


def _growth(pattern: Mapping[str, str], content: int) -> float:
    """How much longer a replacement makes a text: a regular expression may match nothing at every place."""
    literal = pattern.get("String", "")
    return max(1.0, content / len(literal)) if literal else 1.0 + content


def _check_model(model: Any) -> None:
    if dropout := getattr(model, "dropout", None):  # Unigram's alpha and nbest_size are in no file
        raise VtpError(
            f"its model has dropout {dropout:g}, which makes prompts random; set dropout to null in "
            "tokenizer.json and export the model again"
        )
    most = getattr(model, "max_input_chars_per_word", 0)
    if most > _LONGEST_WORD:
        raise VtpError(
            f"its words may have {most} characters in one piece (limit: {_LONGEST_WORD}); refuse this model"
        )
