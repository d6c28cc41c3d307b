"""Pictures of coloured shapes on textured ground, and questions about them with their answers.

Everything follows from a seed. Training seeds lie below `HELD_OUT`, held-out seeds from it upwards, so that
no picture of the exam can ever have been trained on. Needs numpy and pillow only.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vtp.scenes.generator.shapes import OUTLINES, coverage

SHAPES = tuple(OUTLINES)
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "green": (35, 165, 55),
    "blue": (40, 70, 225),
    "yellow": (240, 220, 40),
    "purple": (140, 45, 190),
    "orange": (245, 135, 20),
    "cyan": (45, 210, 220),
    "pink": (250, 135, 195),
}
KINDS = ("shape", "color", "count", "where")
PLACES = ("northwest", "northeast", "southwest", "southeast")
HELD_OUT = 1 << 40
PATCH = 14
SIZES = tuple(range(168, 337, 28))
RADIUS = (12.0, 20.0)


@dataclass(frozen=True)
class Thing:
    """One shape in a picture: centre and radius in pixels, turn in radians."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    turn: float


@dataclass(frozen=True)
class Picture:
    """One generated picture.

    pixels: uint8 [H, W, 3], RGB. owner: uint8 [H, W], 0 for ground, i + 1 where `things[i]` covers the pixel.
    """

    pixels: np.ndarray
    owner: np.ndarray
    things: tuple[Thing, ...]

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image."""
        return Image.fromarray(self.pixels)


@dataclass(frozen=True)
class Question:
    """A question about a picture, its answer, and its kind (one of `KINDS`)."""

    text: str
    answer: str
    kind: str


def training_seed(index: int) -> int:
    """The seed of training picture `index`; raises ValueError outside the training range."""
    if not 0 <= index < HELD_OUT:
        raise ValueError(f"training picture {index} is outside 0 to {HELD_OUT - 1}")
    return index


def held_out_seed(index: int) -> int:
    """The seed of held-out picture `index` (0, 1, …)."""
    if index < 0:
        raise ValueError(f"held-out picture {index} is negative; count from 0")
    return HELD_OUT + index


def draw(seed: int, size: int = 336, objects: tuple[int, int] = (3, 6)) -> Picture:
    """Generate the picture of `seed`, `size` pixels square, with between objects[0] and objects[1] shapes."""
    if size % PATCH or not 112 <= size <= 672:
        raise ValueError(f"size {size} is not allowed; choose a multiple of {PATCH} from 112 to 672")
    rng = np.random.default_rng([seed, size])
    things = _arrange(rng, size, int(rng.integers(objects[0], objects[1] + 1)))
    canvas = _ground(rng, size)
    owner = np.zeros((size, size), np.uint8)
    for number, thing in enumerate(things, 1):
        _paint(canvas, owner, thing, number, rng)
    canvas += rng.integers(0, 256, (size, size, 3), dtype=np.uint8) >> 4
    return Picture(np.clip(canvas - 8, 0, 255, out=canvas).astype(np.uint8), owner, things)


def ask(picture: Picture, kind: str, rng: np.random.Generator) -> Question:
    """A question of `kind` with exactly one right answer; raises ValueError on an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of question {kind!r}; choose one of {', '.join(KINDS)}")
    if kind == "count":
        return _ask_count(picture, rng)
    singles = unique_words(picture)
    if kind == "where":
        word = str(rng.choice(sorted(singles)))
        return Question(f"where is the {word} ?", place(picture, singles[word]), kind)
    vocabulary = COLORS if kind == "shape" else SHAPES
    word = str(rng.choice(sorted(w for w in singles if w in vocabulary)))
    return Question(f"what {kind} is the {word} ?", getattr(singles[word], kind), kind)


def count(picture: Picture, word: str) -> int:
    """How many things have `word` as their shape or colour."""
    return sum(word in (thing.shape, thing.color) for thing in picture.things)


def unique_words(picture: Picture) -> dict[str, Thing]:
    """The shapes and colours that occur exactly once, with the thing that has them."""
    seen = Counter(word for thing in picture.things for word in (thing.shape, thing.color))
    return {w: t for t in picture.things for w in (t.shape, t.color) if seen[w] == 1}


def place(picture: Picture, thing: Thing) -> str:
    """The quarter of the picture that holds the centre of `thing`, one of `PLACES`."""
    height, width = picture.owner.shape
    return f"{'north' if thing.y < height / 2 else 'south'}{'west' if thing.x < width / 2 else 'east'}"


def _ask_count(picture: Picture, rng: np.random.Generator) -> Question:
    """Draw the answer first, so that small counts do not crowd out the others."""
    by_count: dict[int, list[str]] = {}
    for word in (*SHAPES, *COLORS):
        by_count.setdefault(count(picture, word), []).append(word)
    numbers = sorted(by_count)
    weights = np.array([0.6 if n == 0 else 1.0 for n in numbers])
    number = int(rng.choice(numbers, p=weights / weights.sum()))
    return Question(f"how many {rng.choice(by_count[number])} ?", str(number), "count")


def _arrange(rng: np.random.Generator, size: int, number: int) -> tuple[Thing, ...]:
    """Shapes that neither touch nor lie on the middle lines, with one unique shape and colour at least."""
    while True:
        spots = _spots(rng, size, number)
        shapes, colors = _crowd(rng, SHAPES, number), _crowd(rng, tuple(COLORS), number)
        if spots is not None and 1 in Counter(shapes).values() and 1 in Counter(colors).values():
            turns = rng.uniform(-0.2, 0.2, number)
            return tuple(
                Thing(s, c, x, y, r, float(t))
                for s, c, (x, y, r), t in zip(shapes, colors, spots, turns, strict=True)
            )


def _crowd(rng: np.random.Generator, words: tuple[str, ...], number: int) -> list[str]:
    """`number` words of which one comes several times, so that counting has something to count."""
    repeated = int(rng.integers(1, max(2, min(4, number - 1) + 1)))
    first, *others = rng.permutation(len(words))
    picks = [first] * repeated + list(rng.choice(others, number - repeated, replace=rng.random() < 0.25))
    return [words[i] for i in rng.permutation(picks)]


def _spots(rng: np.random.Generator, size: int, number: int) -> list[tuple[float, float, float]] | None:
    """Centres and radii in pixels, or None when they did not fit."""
    spots: list[tuple[float, float, float]] = []
    for _ in range(60):
        radius = float(rng.uniform(*RADIUS))
        x, y = (float(v) for v in rng.uniform(radius + 3, size - radius - 3, 2))
        off_middle = min(abs(x - size / 2), abs(y - size / 2)) >= PATCH
        if off_middle and all(np.hypot(x - a, y - b) >= 1.1 * (radius + r) + PATCH for a, b, r in spots):
            spots.append((x, y, radius))
        if len(spots) == number:
            return spots
    return None


def _ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """Greyish texture of three scales, float32 [size, size, 3]."""
    base = rng.uniform(70, 170) + rng.uniform(-14, 14, 3)
    canvas = np.broadcast_to(base.astype(np.float32), (size, size, 3)).copy()
    for cell, strength in ((size // 4, 0.22), (size // 14, 0.16), (5, 0.12)):
        cells = -(-size // cell) + 1
        grid = rng.integers(0, 256, (cells, cells), dtype=np.uint8)
        blown = Image.fromarray(grid).resize((size, size), Image.Resampling.BILINEAR)
        canvas += ((np.asarray(blown, np.float32) - 128) * strength)[:, :, None]
    return canvas


def _paint(
    canvas: np.ndarray, owner: np.ndarray, thing: Thing, number: int, rng: np.random.Generator
) -> None:
    mask, top, left = coverage(thing.shape, thing.x, thing.y, thing.radius, thing.turn)
    rows = slice(max(top, 0), min(top + mask.shape[0], owner.shape[0]))
    cols = slice(max(left, 0), min(left + mask.shape[1], owner.shape[1]))
    mask = mask[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]
    color = np.clip(np.array(COLORS[thing.color]) + rng.uniform(-14, 14, 3), 0, 255).astype(np.float32)
    canvas[rows, cols] += mask[:, :, None] * (color - canvas[rows, cols])
    owner[rows, cols][mask >= 0.5] = number
