"""Log-probabilities of an answer's tokens, as OpenAI's `logprobs` and `top_logprobs` give them.

They are the model's own: the log-softmax of its raw logits, at temperature 1, before penalties, bans,
constraints, top-p and sampling. So a token that a rule forced may have a very low one, and an answer's
tokens are its most likely ones only where it is greedy and no rule changed the logits.
"""

from __future__ import annotations

import numpy as np

from vtp.engines.errors import UsageError, quoted_argument
from vtp.runtime.generation.arguments import is_whole
from vtp.runtime.prompt.token_bytes import TokenBytes
from vtp.runtime.result import TokenLogprob

__all__ = ["MOST_ALTERNATIVES", "LogprobRecorder", "alternatives", "log_softmax", "most_likely"]

MOST_ALTERNATIVES = 20  # OpenAI's limit


def alternatives(wanted: object) -> int | None:
    """`logprobs` of a caller as a number of alternatives; UsageError unless it is None or 0 to 20."""
    if wanted is None:
        return None
    if not is_whole(wanted) or not 0 <= wanted <= MOST_ALTERNATIVES:
        raise UsageError(
            f"logprobs {quoted_argument(wanted)} is not a number of alternatives; give 0 (the chosen token's "
            f"only) to {MOST_ALTERNATIVES}, or None (off)"
        )
    return int(wanted)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of probabilities, float64 [V], of finite logits [V]."""
    below = logits.astype(np.float64) - float(logits.max())
    return below - np.log(np.exp(below).sum())


def most_likely(scores: np.ndarray, count: int) -> np.ndarray:
    """The ids of the `count` largest scores [V], largest first; of equal ones the lower id first."""
    count = min(count, len(scores))
    if not count:
        return np.zeros(0, np.int64)
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    eligible = np.flatnonzero(scores >= least)
    return eligible[np.argsort(-scores[eligible], kind="stable")][:count]


class LogprobRecorder:
    """Fills an answer's list, as its tokens become part of the text.

    Tokens enter the list once the text has reached them: what is held back, or cut off by a stop string, is
    not in it. The token that ends an answer never is.
    """

    def __init__(self, count: int, tokens: TokenBytes, entries: list[TokenLogprob]) -> None:
        self._count, self._tokens, self._entries = count, tokens, entries
        self._waiting: list[tuple[int, TokenLogprob]] = []  # where each begins in the text
        self._length = 0

    def add(self, token: int, logits: np.ndarray, text: str) -> None:
        """Note a token, chosen by logits [V], and the text that the detokenizer gave for it."""
        scores = log_softmax(logits)
        top = [self._entry(int(other), scores) for other in most_likely(scores, self._count)]
        self._waiting.append((self._length, self._entry(token, scores, tuple(top))))
        self._length += len(text)

    def show(self, length: int) -> None:
        """The answer's text now has this number of characters."""
        while self._waiting and self._waiting[0][0] < length:
            self._entries.append(self._waiting.pop(0)[1])

    def finish(self) -> None:
        """The text is whole: what waits, such as special tokens that are not shown, belongs to it."""
        self._entries += [entry for _, entry in self._waiting]
        self._waiting.clear()

    def _entry(self, token: int, scores: np.ndarray, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        raw = self._tokens.of(token)
        return TokenLogprob(raw.decode("utf-8", errors="replace"), token, raw, float(scores[token]), top)
