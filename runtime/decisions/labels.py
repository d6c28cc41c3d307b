"""Which tokens stand for which answer, at the first place of what the model writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vtp.engines.errors import RequestError, quoted_argument
from vtp.runtime.decisions.question import LETTERS, Question
from vtp.runtime.prompt.prompter import Prompter

# What may stand before an answer, and how it then begins: a prompt's end differs from template to template.
_PLACES = (("\n", ""), (":", ""), (":", " "), ("a", " "))


def label_tokens(question: Question, prompter: Prompter) -> list[np.ndarray]:
    """For each answer, the ids int64 of the tokens by which the model begins it.

    With and without a space in front, at a line's beginning and after other text: the same word has several
    tokens, and the answer's probability is that of all of them. Letters, numbers, yes and no are whole in
    one token, or that way to write them does not count; of texts, the first token counts. A token with which
    two answers begin counts for neither. RequestError if an answer is left without any.
    """
    found = [_begins(texts, question.labels == LETTERS, prompter) for texts in question.written]
    shared = Counter(token for tokens in found for token in tokens)
    own = [sorted(token for token in tokens if shared[token] == 1) for tokens in found]
    for name, texts, tokens, left in zip(question.names, question.written, found, own, strict=True):
        if not left:
            _refuse(question, name, texts[0], bool(tokens))
    return [np.array(tokens, np.int64) for tokens in own]


def _begins(texts: Sequence[str], whole: bool, prompter: Prompter) -> set[int]:
    """The first tokens of some texts, in every place."""
    tokens: set[int] = set()
    for text in texts:
        for before, space in _PLACES:
            ids = prompter.continued(before, space + text)
            if ids and (not whole or len(ids) == 1) and _starts(prompter.token_bytes.of(ids[0]), text):
                tokens.add(ids[0])
    return tokens


def _starts(token: bytes, text: str) -> bool:
    """Whether a token is the text's beginning, in any case: not a space alone, nor one for unknown words."""
    word = token.strip().lower()
    return bool(word) and text.strip().lower().encode().startswith(word)


def _refuse(question: Question, name: str, text: str, shared: bool) -> None:
    if question.labels == LETTERS:
        raise RequestError(
            f"this model's tokenizer has no token for the label {quoted_argument(text)}, so that no step "
            'decides; try labels="texts"'
        )
    why = "begins with the same token as another" if shared else "begins with no token of its own"
    raise RequestError(
        f'the answer {quoted_argument(name)} {why}, so one step cannot tell them apart; use labels="letters"'
    )
