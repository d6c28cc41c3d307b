"""Pictures of coloured shapes on textured ground, and questions about them with their answers.

Everything follows from a seed. Training seeds lie below `HELD_OUT`, held-out seeds from it upwards, so that
no picture of the exam can ever have been trained on. Needs numpy and pillow only.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vtp.scenes.generator.shapes import OUTLINES, coverage
from vtp.scenes.generator.signs import Sign, arrange_signs, paint_sign

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
READER_KINDS = (*KINDS, "presence", "sign")
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
    signs: tuple[Sign, ...] = ()

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image."""
        return Image.fromarray(self.pixels)


@dataclass(frozen=True)
class Question:
    """A question about a picture, its answer, and its kind (one of `READER_KINDS`)."""

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


def draw(
    seed: int, size: int = 336, objects: tuple[int, int] = (3, 6), signs: tuple[int, int] = (0, 0)
) -> Picture:
    """Generate the picture of `seed`, `size` pixels square, with between objects[0] and objects[1] shapes.

    Between signs[0] and signs[1] signs are added to the same picture if there is room (one always finds it
    at 336 pixels); nothing else of it changes.
    """
    if size % PATCH or not 112 <= size <= 672:
        raise ValueError(f"size {size} is not allowed; choose a multiple of {PATCH} from 112 to 672")
    rng = np.random.default_rng([seed, size])
    things = _arrange(rng, size, int(rng.integers(objects[0], objects[1] + 1)))
    canvas = _ground(rng, size)
    owner = np.zeros((size, size), np.uint8)
    for number, thing in enumerate(things, 1):
        _paint(canvas, owner, thing, number, rng)
    plates = _put_signs(canvas, things, signs, np.random.default_rng([seed, size, 2]))
    canvas += rng.integers(0, 256, (size, size, 3), dtype=np.uint8) >> 4
    return Picture(np.clip(canvas - 8, 0, 255, out=canvas).astype(np.uint8), owner, things, plates)


def ask(picture: Picture, kind: str, rng: np.random.Generator) -> Question:
    """A question of `kind` with exactly one right answer; raises ValueError on an unknown kind."""
    if kind not in READER_KINDS:
        raise ValueError(f"unknown kind of question {kind!r}; choose one of {', '.join(READER_KINDS)}")
    if kind == "count":
        return _ask_count(picture, rng)
    if kind == "presence":
        return ask_presence(picture, bool(rng.random() < 0.5), rng)
    if kind == "sign":
        return _ask_sign(picture)
    singles = unique_words(picture)
    if kind == "where":
        word = str(rng.choice(sorted(singles)))
        return Question(f"where is the {word} ?", place(picture, singles[word]), kind)
    vocabulary = COLORS if kind == "shape" else SHAPES
    word = str(rng.choice(sorted(w for w in singles if w in vocabulary)))
    return Question(f"what {kind} is the {word} ?", getattr(singles[word], kind), kind)


def ask_presence(picture: Picture, there: bool, rng: np.random.Generator) -> Question:
    """Is there a thing of one colour and shape ? A thing that is not there shares both words with others.

    Seven of ten absent things have a colour and a shape that other things show; the rest one of the two.
    """
    shown = {(thing.color, thing.shape) for thing in picture.things}
    if there:
        pairs = sorted(shown)
    else:
        colors, shapes = {c for c, _ in shown}, {s for _, s in shown}
        hard = {(c, s) for c in colors for s in shapes} - shown
        half = {(c, s) for c in COLORS for s in SHAPES if (c in colors) != (s in shapes)}
        pairs = sorted(hard if hard and rng.random() < 0.7 else half)
    color, shape = pairs[int(rng.integers(len(pairs)))]
    article = "an" if color[0] in "aeiou" else "a"
    return Question(f"is there {article} {color} {shape} ?", "yes" if there else "no", "presence")


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


def _ask_sign(picture: Picture) -> Question:
    if len(picture.signs) != 1:
        raise ValueError(f"a picture with {len(picture.signs)} signs cannot be asked for one; draw it with 1")
    return Question("what is on the sign ?", picture.signs[0].text, "sign")


def _put_signs(
    canvas: np.ndarray, things: tuple[Thing, ...], number: tuple[int, int], rng: np.random.Generator
) -> tuple[Sign, ...]:
    wanted = int(rng.integers(number[0], number[1] + 1))
    signs = arrange_signs(rng, len(canvas), wanted, [(t.x, t.y, t.radius) for t in things])
    for sign in signs:
        paint_sign(canvas, sign, rng)
    return signs


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
