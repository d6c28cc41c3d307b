"""The form of one answer while it is written: which tokens may come next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from vtp.engines import VtpError
from vtp.runtime.constrained.errors import refused
from vtp.runtime.prompt.tokenizer import failing_as

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["ConstrainedRules", "Constraint"]

_FAILED = "the answer's form cannot be held"


class Constraint:
    """One answer's own place in a grammar. FormatError if the form asks too much to go on, VtpError if the
    library fails; either ends this answer alone."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, count: int) -> np.ndarray:
        """Which of `count` tokens may come next: bool [count]."""
        with failing_as(_FAILED):
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        bits = np.unpackbits(mask, bitorder="little", count=min(count, 8 * len(mask))).astype(bool)
        return np.pad(bits, (0, count - len(bits)))

    def add(self, token: int) -> None:
        """Note the token that was chosen."""
        with failing_as(_FAILED):
            self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing more may come."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _check(self) -> None:
        if self._matcher.is_error():
            words = VtpError(f"llguidance: {self._matcher.get_error()}")
            raise refused(f"{_FAILED}: the schema asks too much; give a simpler one") from words


class _Rules(Protocol):
    def __call__(self, logits: np.ndarray) -> np.ndarray: ...

    def add(self, token: int) -> None: ...


class ConstrainedRules:
    """A model's own rules about logits, if there are any, and the answer's form, which comes first."""

    def __init__(self, constraint: Constraint, rules: _Rules | None) -> None:
        self.constraint = constraint
        self._rules = rules

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Scores float32 [V]; tokens that must not come are -inf. FormatError if all are."""
        allowed = self.constraint.allowed(len(logits))
        raw = logits.astype(np.float32)
        for scores in (raw if self._rules is None else self._rules(logits), raw):
            held = np.where(allowed, scores, np.float32(-np.inf))
            if np.isfinite(held.max()):
                return held
        raise refused(f"{_FAILED}: the model has no token that may come next; ask for another one")

    def add(self, token: int) -> None:
        """Note the token that was chosen."""
        self.constraint.add(token)
        if self._rules is not None:
            self._rules.add(token)
