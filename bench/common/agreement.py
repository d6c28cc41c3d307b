"""Whether two answers of one model are equal, or alike where both were rounded on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vtp.runtime.compare import compare

Answer = tuple[list[int], np.ndarray]  # tokens, and float32 [V] logits of the last prompt position
# Of fewer bits: the cosine to float32's logits, less their means. Another model's would be near 0.
_ALIKE = 0.5


def agreement(one: Answer, other: Answer, limits: str = "float32") -> dict[str, Any]:
    """Two answers (tokens, first logits): `difference` of the logits (relative, see `compare`), whether they
    are `close` and `why` not, and how many `tokens` are equal from the first on, of how many."""
    result, equal = compare(other[1], one[1], limits), _equal_tokens(one[0], other[0])
    return {
        "close": result.ok and equal > 0,
        "why": f"logits: {result.why}" if not result.ok else "" if equal else "the first token differs",
        "difference": result.relative,
        "tokens": equal,
        "of": len(one[0]),
    }


def likeness(one: Answer, other: Answer) -> dict[str, Any]:
    """The same of answers in different bits, which are close if their logits point the same way; `cosine`.

    Logits are taken less their mean, which says nothing of a token and which some do not tell.
    """
    result = compare(other[1] - other[1].mean(), one[1] - one[1].mean(), "int4")
    return {
        "close": result.cosine >= _ALIKE,
        "why": f"logits: cosine {result.cosine:.3f}, at least {_ALIKE:g} is another rounding of one model",
        "difference": result.relative,
        "cosine": result.cosine,
        "tokens": _equal_tokens(one[0], other[0]),
        "of": len(one[0]),
    }


def _equal_tokens(wanted: Sequence[int], found: Sequence[int]) -> int:
    """How many are equal from the first on."""
    pairs = zip(wanted, found, strict=False)
    return next((at for at, (one, two) in enumerate(pairs) if one != two), min(len(wanted), len(found)))
