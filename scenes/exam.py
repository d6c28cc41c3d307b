"""The exam: held-out questions, exact-match scores per kind, and their confidence intervals.

The questions of a picture (one of each kind) come one after another, so that a caller can encode a picture
once: see `by_picture`. There are two exams about the same things: `KINDS`, and `READER_KINDS`, whose pictures
also hold a sign. Needs numpy and pillow only.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vtp.scenes.generator.pictures import (
    KINDS,
    READER_KINDS,
    Picture,
    Question,
    ask,
    ask_presence,
    draw,
    held_out_seed,
)

SEED = 2026
EXAMS = {"model": KINDS, "reader": READER_KINDS}  # kinds of question by the model that they are for
_STRIDE = 1_000_003  # keeps the pictures of neighbouring exam seeds apart


@dataclass(frozen=True)
class Item:
    """One question of the exam. Items with equal `picture` share the same `image` object."""

    picture: int
    image: Image.Image
    prompt: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Score:
    """Right answers out of all, with the 95 % Wilson interval of the rate."""

    right: int
    total: int

    @property
    def rate(self) -> float:
        """Fraction answered right (0 of an empty exam)."""
        return self.right / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval of `rate`."""
        return wilson(self.right, self.total)


def held_out(count: int = 1000, seed: int = SEED, kinds: tuple[str, ...] = KINDS) -> Iterator[Item]:
    """`count` held-out questions, generated one picture at a time; the same arguments give the same exam.

    `kinds` is `KINDS`, or `READER_KINDS` for the reader's exam: the same things and the same questions about
    them, in pictures with one sign, and two questions more, of which presence is answered yes and no in turn.
    """
    if count < 1:
        raise ValueError(f"count {count} is not allowed; ask for 1 question or more")
    if kinds not in EXAMS.values():
        raise ValueError(f"no exam has the kinds {kinds}; choose {KINDS} or {READER_KINDS}")
    return itertools.islice(_questions(seed, kinds), count)


def by_picture(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Group consecutive items that share a picture."""
    for _, group in itertools.groupby(items, key=lambda item: item.picture):
        yield list(group)


def blank(image: Image.Image) -> Image.Image:
    """A plain grey picture of the same size: what remains right on it was guessed."""
    return Image.new("RGB", image.size, (120, 120, 120))


def is_right(answer: str, truth: str) -> bool:
    """Exact match after trimming blanks at both ends."""
    return answer.strip() == truth.strip()


def score(items: Iterable[Item], answers: Iterable[str]) -> dict[str, Score]:
    """Exact match per kind, and for all under the key "all"; raises ValueError on unequal lengths.

    The kinds of the reader are keys only if they were asked.
    """
    tally: dict[str, list[int]] = {kind: [0, 0] for kind in ("all", *KINDS)}
    for item, answer in zip(items, answers, strict=True):
        for key in ("all", item.kind):
            tally.setdefault(key, [0, 0])[0] += is_right(answer, item.answer)
            tally[key][1] += 1
    return {key: Score(right, total) for key, (right, total) in tally.items()}


def report(scores: dict[str, Score]) -> str:
    """A plain table of `score`'s result, one line per kind, in percent."""
    lines, width = [], max(6, *(len(key) for key in scores))
    for key, value in scores.items():
        low, high = value.interval
        lines.append(
            f"{key:<{width}} {100 * value.rate:5.1f} %  ({100 * low:.1f}-{100 * high:.1f})  of {value.total}"
        )
    return "\n".join(lines)


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of the rate right / total; (0, 1) for an empty sample."""
    if total == 0:
        return 0.0, 1.0
    rate, share = right / total, z * z / total
    middle = (rate + share / 2) / (1 + share)
    half = z * math.sqrt(rate * (1 - rate) / total + share / (4 * total)) / (1 + share)
    return max(0.0, middle - half), min(1.0, middle + half)


def _questions(seed: int, kinds: tuple[str, ...]) -> Iterator[Item]:
    signs = (1, 1) if "sign" in kinds else (0, 0)
    for number in itertools.count():
        picture_seed = held_out_seed(seed * _STRIDE + number)
        picture = draw(picture_seed, signs=signs)
        image, rng = picture.image, np.random.default_rng([picture_seed, 1])
        for kind in kinds:
            question = _ask(picture, kind, rng, number)
            yield Item(number, image, question.text, question.answer, kind)


def _ask(picture: Picture, kind: str, rng: np.random.Generator, number: int) -> Question:
    """Of presence, every second picture has what is asked for."""
    return ask_presence(picture, number % 2 == 0, rng) if kind == "presence" else ask(picture, kind, rng)
