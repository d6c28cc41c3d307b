"""What a model's generation_config changes in the logits before a token is chosen: penalties and bans.

The rules and their order are those of transformers' `generate` (`_get_logits_processor`, logits_process.py);
arithmetic is float32, as there. A prompt counts as transformers writes it: with every visual token in it,
those that pruning drops among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np

from vtp.engines.errors import UsageError, VtpError, quoted_argument
from vtp.runtime.bundle.manifest import GenerationInfo
from vtp.runtime.generation.arguments import is_penalty

__all__ = ["LogitsRules", "with_penalty", "written_out"]


def with_penalty(info: GenerationInfo, repetition_penalty: float | None) -> GenerationInfo:
    """`info` with a caller's repetition penalty instead of the model's; None leaves it.

    Raises UsageError for what is not a number above 0, or is 0 or infinite in float32.
    """
    if repetition_penalty is None:
        return info
    if not is_penalty(repetition_penalty):
        raise UsageError(
            f"repetition_penalty {quoted_argument(repetition_penalty)} is not allowed; choose a number "
            "above 0 (1: off), from 1.2e-38 to 3.4e+38"
        )
    return replace(info, repetition_penalty=float(repetition_penalty))


def written_out(ids: Sequence[int], image: int, runs: Sequence[int]) -> list[int]:
    """The `ids` of a prompt as transformers writes them: each run of a picture's tokens at its full length.

    image  the id that stands for a run
    runs   visual tokens of every run (tile) of one picture before pruning
    """
    lengths = cycle(runs)
    return [item for token in ids for item in [token] * (next(lengths) if token == image else 1)]


class LogitsRules:
    """The rules of one answer. Call it with the logits of each step, and `add` the token that was chosen.

    ids             of the prompt, as `written_out` gives them
    eos_ids         the ids that end the answer
    max_new_tokens  length of the answer, whose last token `forced_eos_token_id` fixes
    """

    def __init__(
        self, info: GenerationInfo, ids: Sequence[int], eos_ids: Sequence[int], max_new_tokens: int
    ) -> None:
        self._ids = list(ids)
        start = len(self._ids)
        least = max(info.min_length, start + info.min_new_tokens)
        words = [word for word in info.bad_words_ids if word not in [[end] for end in eos_ids]]
        # transformers' order.
        rules: list[tuple[bool, _Rule]] = [
            (info.repetition_penalty != 1, _RepetitionPenalty(info.repetition_penalty)),
            (info.no_repeat_ngram_size > 0, _NoRepeat(info.no_repeat_ngram_size)),
            (bool(words), _BadWords(words)),
            (least > start, _BanBefore(least, eos_ids)),
            (bool(info.forced_eos_token_id), _Force(start + max_new_tokens - 1, info.forced_eos_token_id)),
            (bool(info.suppress_tokens), _Ban(info.suppress_tokens)),
            (bool(info.begin_suppress_tokens), _BanBefore(start + 1, info.begin_suppress_tokens)),
        ]
        self._rules = [rule for wanted, rule in rules if wanted]

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Scores float32 [V] for logits [V]; tokens that must not come are -inf. VtpError if all are."""
        scores = logits.astype(np.float32)  # a copy: the logits are the engine's
        for rule in self._rules:
            rule.apply(scores, self._ids)
        if not np.isfinite(scores.max()):
            raise VtpError(
                "the model's generation settings leave no token to choose: bad_words_ids, suppress_tokens "
                "and others ban all of them; export it again with a milder generation_config.json"
            )
        return scores

    def add(self, token: int) -> None:
        """Note the token that was chosen."""
        self._ids.append(token)


class _Rule:
    """Changes scores [V] in place, after what was written so far."""

    def apply(self, scores: np.ndarray, ids: list[int]) -> None:
        raise NotImplementedError


class _RepetitionPenalty(_Rule):
    """Makes every token that was written less likely: positive scores / penalty, negative ones x penalty."""

    def __init__(self, penalty: float) -> None:
        self._penalty = np.float32(penalty)
        self._seen = np.zeros(0, np.int64)
        self._read = 0

    def apply(self, scores: np.ndarray, ids: list[int]) -> None:
        """Divide or multiply the scores of all tokens so far; VtpError if one becomes infinite."""
        self._seen = np.union1d(self._seen, np.asarray(ids[self._read :], np.int64))
        self._read = len(ids)
        places = self._seen[self._seen < len(scores)]
        found = scores[places]
        with np.errstate(over="ignore"):
            scores[places] = np.where(found < 0, found * self._penalty, found / self._penalty)
        if np.isposinf(scores[places]).any():
            raise VtpError(
                f"repetition_penalty {self._penalty:g} makes scores infinite; choose one nearer to 1 (off)"
            )


class _NoRepeat(_Rule):
    """Bans the tokens that would complete a run of `size` tokens that was written before."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._after: dict[tuple[int, ...], list[int]] = {}
        self._read = 0

    def apply(self, scores: np.ndarray, ids: list[int]) -> None:
        for end in range(max(self._read, self._size - 1), len(ids)):
            self._after.setdefault(tuple(ids[end - self._size + 1 : end]), []).append(ids[end])
        self._read = len(ids)
        _ban(scores, self._after.get(tuple(ids[len(ids) + 1 - self._size :]), ()))


class _BadWords(_Rule):
    """Bans the last token of every word whose other tokens were just written."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self._last: dict[tuple[int, ...], list[int]] = {}
        for word in words:
            self._last.setdefault(tuple(word[:-1]), []).append(word[-1])
        self._lengths = sorted({len(start) for start in self._last})

    def apply(self, scores: np.ndarray, ids: list[int]) -> None:
        for length in self._lengths:
            if length <= len(ids):
                _ban(scores, self._last.get(tuple(ids[len(ids) - length :]), ()))


class _Ban(_Rule):
    """Bans some tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def apply(self, scores: np.ndarray, ids: list[int]) -> None:
        _ban(scores, self._tokens)


class _BanBefore(_Ban):
    """Bans some tokens as long as fewer than `least` tokens are written."""

    def __init__(self, least: int, tokens: Sequence[int]) -> None:
        super().__init__(tokens)
        self._least = least

    def apply(self, scores: np.ndarray, ids: list[int]) -> None:
        if len(ids) < self._least:
            super().apply(scores, ids)


class _Force(_Rule):
    """Leaves only some tokens, of equal score, after `place` tokens."""

    def __init__(self, place: int, tokens: Sequence[int]) -> None:
        self._place = place
        self._tokens = list(tokens)

    def apply(self, scores: np.ndarray, ids: list[int]) -> None:
        if len(ids) == self._place:
            scores[:] = -np.inf
            scores[self._tokens] = 0


def _ban(scores: np.ndarray, tokens: Iterable[int]) -> None:
    """Tokens outside the vocabulary cannot come anyway."""
    scores[[token for token in tokens if 0 <= token < len(scores)]] = -np.inf
