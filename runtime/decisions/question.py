"""What is decided: a question of one of three kinds, the prompt that asks it, and the labels of its answers.

The kinds, and labels by letter or number, are those of SGLang's /v1/decisions; the wording is this file's.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vtp.engines.errors import RequestError, quoted_argument

__all__ = ["KINDS", "LABELS", "MOST_LEVELS", "MOST_OPTIONS", "Question"]

YES_NO, CHOICE, SCORE = "yes_no", "choice", "score"
KINDS = (YES_NO, CHOICE, SCORE)
LETTERS, TEXTS = "letters", "texts"
LABELS = (LETTERS, TEXTS)
MOST_OPTIONS = len(string.ascii_uppercase)
MOST_LEVELS = 10
_LONGEST = 2**12  # characters of one option
_MOST = {CHOICE: MOST_OPTIONS, SCORE: MOST_LEVELS}
_ORDERS = {
    YES_NO: "Answer with yes or no only.",
    CHOICE: "Answer with the letter of one option only.",
    SCORE: "Answer with the number of one level only.",
}


@dataclass(frozen=True)
class Question:
    """A question whose answers are known.

    kind     "yes_no", "choice" or "score"
    text     what is asked
    names    the answers: "yes" and "no"; the options; the levels' numbers "0", "1" and so on
    details  of each answer: what it means in words, or ""
    labels   "letters": the prompt gives each answer a letter or number, which the model is to write; "texts":
             the question stands alone, and the answers' own first tokens are compared
    """

    kind: str
    text: str
    names: tuple[str, ...]
    details: tuple[str, ...]
    labels: str = LETTERS

    @classmethod
    def of(
        cls,
        text: str,
        options: Sequence[str] | Mapping[str, str] | None = None,
        kind: str | None = None,
        labels: str = LETTERS,
    ) -> Question:
        """Checked; raises RequestError. For the arguments see `Pipeline.decide`."""
        kind = kind or (YES_NO if options is None else CHOICE)
        if kind not in KINDS:
            raise RequestError(f"kind {quoted_argument(kind)} is not known; choose one of {', '.join(KINDS)}")
        if labels not in LABELS:
            raise RequestError(
                f"labels {quoted_argument(labels)} is not known; choose one of {', '.join(LABELS)}"
            )
        if not isinstance(text, str) or not text.strip():
            raise RequestError("the question is empty, or no text; ask something about the picture")
        names, details = _answers(kind, options, labels)
        return cls(kind, text, names, details, labels)

    @property
    def prompt(self) -> str:
        """The words that the model reads."""
        if self.labels == TEXTS:
            return self.text
        return "\n".join([self.text, *self._lines(), _ORDERS[self.kind]])

    @property
    def written(self) -> tuple[tuple[str, ...], ...]:
        """For each answer, what the model may write for it."""
        if self.kind == YES_NO:
            return tuple((name, name.capitalize()) for name in self.names)
        if self.kind == CHOICE and self.labels == LETTERS:
            return tuple((letter,) for letter in string.ascii_uppercase[: len(self.names)])
        if self.kind == SCORE and self.labels == TEXTS:
            return tuple((detail,) for detail in self.details)
        return tuple((name,) for name in self.names)

    def _lines(self) -> list[str]:
        """What the answers mean, a line each."""
        if self.kind == CHOICE:
            meanings = [f"{name}: {detail}" if detail else name for name, detail in self._pairs()]
        else:
            meanings = list(self.details)
        labels = [first for first, *_ in self.written]
        return [f"{label}) {text}" for label, text in zip(labels, meanings, strict=True) if text]

    def _pairs(self) -> zip[tuple[str, str]]:
        return zip(self.names, self.details, strict=True)


def _answers(kind: str, options: object, labels: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and details."""
    if kind == YES_NO:
        meanings = {} if options is None else options
        if not isinstance(meanings, Mapping) or not set(meanings) <= {"yes", "no"}:
            raise RequestError(
                'a yes_no question has no options; what they mean may be {"yes": ..., "no": ...}'
            )
        return ("yes", "no"), tuple(_text(meanings.get(name, ""), "a meaning") for name in ("yes", "no"))
    what = "options" if kind == CHOICE else "levels"
    if isinstance(options, str) or not isinstance(options, Sequence | Mapping):
        raise RequestError(f"the {what} must be a list of texts, not {quoted_argument(options)}")
    if not 2 <= len(options) <= _MOST[kind]:
        raise RequestError(f"{len(options)} {what} are given; give 2 to {_MOST[kind]}")
    texts = tuple(_text(one, f"one of the {what}") for one in options)
    if empty := [place for place, text in enumerate(texts) if not text.strip()]:
        raise RequestError(f"number {empty[0] + 1} of the {what} is empty; give each a text")
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise RequestError(f"{quoted_argument(twice)} is given twice; the {what} must differ")
    if kind == SCORE:
        if isinstance(options, Mapping):
            raise RequestError("the levels must be a list of texts, from the lowest to the highest")
        return tuple(map(str, range(len(texts)))), texts
    details = options.values() if isinstance(options, Mapping) else [""] * len(texts)
    return texts, tuple(_text(detail, "a meaning") for detail in details)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{what} must be text, not {quoted_argument(value)}")
    if len(value) > _LONGEST:
        raise RequestError(f"{what} has {len(value)} characters; give at most {_LONGEST}")
    return value
