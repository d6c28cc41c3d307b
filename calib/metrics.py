"""How right an answer is, from 0 to 1: exact match, the VQA vote, or agreement with all tokens kept."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vtp.engines import UsageError

METRICS = ("auto", "exact", "vqa", "agreement")

_ARTICLES = {"a", "an", "the"}
_NUMBERS = dict(
    zip(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
        map(str, range(11)),
        strict=True,
    )
)
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-<>@`?!]")


def choose_metric(wanted: str, answers: Sequence[str]) -> str:
    """The metric to use: by name, or from a question's accepted answers.

    auto: agreement where no answer is known, the VQA vote for ten annotators' answers, else exact match.
    """
    if wanted not in METRICS:
        raise UsageError(f"unknown metric '{wanted}'; choose one of {', '.join(METRICS)}")
    if wanted == "auto":
        return "agreement" if not answers else "vqa" if len(answers) >= 10 else "exact"
    if wanted != "agreement" and not answers:
        raise UsageError(f"metric {wanted} needs answers, and the data has none; use --metric agreement")
    return wanted


def normalize(text: str) -> str:
    """An answer as the VQA evaluation compares it: lower case, digits for small numbers, no articles.

    Commas within numbers and full stops that are no decimal points go; other punctuation becomes a space.
    After the VQA challenge's evaluation (Antol et al., arXiv 1505.00468), without its contractions.
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().strip())
    text = re.sub(r"\.(?!\d)", "", text.replace("'", ""))
    words = _PUNCTUATION.sub(" ", text.replace(",", " ").replace(":", " ")).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def exact(answer: str, accepted: Sequence[str]) -> float:
    """1 if the normalised answer is one of the accepted ones."""
    return float(normalize(answer) in {normalize(one) for one in accepted})


def vqa(answer: str, annotators: Sequence[str]) -> float:
    """The VQA accuracy: min(1, matches / 3), averaged over leaving each annotator out."""
    given, votes = normalize(answer), [normalize(one) for one in annotators]
    matches = [vote == given for vote in votes]
    if len(votes) < 2:
        return float(any(matches))
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(votes)


def agreement(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """Share of the reference's tokens that an answer repeats before the first that differs; 1 for none."""
    if not reference:
        return float(not tokens)
    same = 0
    for one, two in zip(tokens, reference, strict=False):
        if one != two:
            break
        same += 1
    return same / max(len(reference), len(tokens))
