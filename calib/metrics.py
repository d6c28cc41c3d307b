"""How right an answer is, from 0 to 1: exact match, a public set's rule, or agreement with another one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vtp.engines import UsageError

METRICS = ("auto", "exact", "vqa", "gqa", "pope", "agreement")

_ARTICLES = {"a", "an", "the"}
_NUMBERS = dict(
    zip(
        ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
        map(str, (0, *range(11))),
        strict=True,
    )
)
# Removed beside a space, else replaced by one.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_STOPS = 32  # the published evaluation removes no more
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


# A word that lacks an apostrophe -> the word. ("somebodyd" keeps none: so in the published table.)
_CONTRACTIONS = {short: word for word in _CONTRACTED.split() for short in _without_one_apostrophe(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"


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
    """An answer as the VQA and TextVQA evaluations compare it.

    Lower case, digits for small numbers, no articles, no commas, question marks and full stops but decimal
    points; other punctuation is removed beside a space and becomes one elsewhere; contractions get their
    apostrophe. After the EvalAI answer processor that TextVQA's and LLaVA's evaluation use.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    found = text
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside else " ")
    return _FULL_STOP.sub("", found, _MOST_STOPS)


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


def gqa(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is an accepted one, letter for letter: GQA's evaluation, after LLaVA's conversion.

    That is: no space around it, no full stops at its end, lower case.
    """
    return float(answer.strip().rstrip(".").lower() in accepted)


def says_yes(answer: str) -> bool:
    """POPE's reading of an answer: no if its first sentence holds the word "No", "no" or "not", else yes."""
    words = answer.strip().partition(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def pope(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer, as POPE reads it, is the accepted "yes" or "no"."""
    return float(("yes" if says_yes(answer) else "no") in accepted)


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
