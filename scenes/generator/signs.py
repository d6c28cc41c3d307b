"""Signs: plates with two or three characters in PIL's own bitmap font, the small detail of a picture.

A character is about one patch (14 px) wide and high, and no two centres share a patch. The bitmap font is the
same in every Pillow, whatever FreeType it was built with. Needs numpy and pillow only.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# No letter of USER and ASSISTANT, which the tokenizer joins, and no two characters that look alike.
ALPHABET = "CDFHJKLMPVXY23456789"
LENGTHS = (2, 3)
SCALE = (1.9, 2.4)  # pixels of the picture per pixel of the font
_CELL = (6, 7)  # width and height of a character in the font
_MARGIN = (6.0, 5.0)  # of the plate around its text, in pixels
_CLEAR = 7.0  # between a plate and everything else, in pixels
_TRIES = 200


@dataclass(frozen=True)
class Sign:
    """One sign: its text, the plate's centre, the font's scale and the characters' distance, in pixels."""

    text: str
    x: float
    y: float
    scale: float
    pitch: float

    @property
    def half(self) -> tuple[float, float]:
        """Half of the plate's width and height in pixels."""
        width = (len(self.text) - 1) * self.pitch + _CELL[0] * self.scale
        return width / 2 + _MARGIN[0], _CELL[1] * self.scale / 2 + _MARGIN[1]

    @property
    def plate(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the plate in pixels."""
        across, down = self.half
        return self.x - across, self.y - down, self.x + across, self.y + down

    def character(self, place: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the character at `place` (0, 1, …) in pixels."""
        middle = self.x + (place - (len(self.text) - 1) / 2) * self.pitch
        across, down = _CELL[0] * self.scale / 2, _CELL[1] * self.scale / 2
        return middle - across, self.y - down, middle + across, self.y + down


def arrange_signs(
    rng: np.random.Generator, size: int, number: int, discs: list[tuple[float, float, float]]
) -> tuple[Sign, ...]:
    """Up to `number` signs clear of each other and of `discs` (x, y, radius), fewer if there is no room."""
    signs: list[Sign] = []
    for _ in range(_TRIES):
        if len(signs) == number:
            break
        sign = _sign(rng, size)
        if all(_apart(sign.plate, disc) for disc in discs) and all(_beside(sign, other) for other in signs):
            signs.append(sign)
    return tuple(signs)


def paint_sign(canvas: np.ndarray, sign: Sign, rng: np.random.Generator) -> None:
    """Paint a pale plate with a rim and dark characters onto `canvas`, float32 [H, W, 3], in place."""
    left, top, right, bottom = (round(v) for v in sign.plate)
    pale, dark = rng.uniform(205, 245) + rng.uniform(-8, 8, 3), rng.uniform(10, 60) + rng.uniform(-8, 8, 3)
    canvas[top:bottom, left:right] = dark
    canvas[top + 1 : bottom - 1, left + 1 : right - 1] = pale
    for place, character in enumerate(sign.text):
        a, b, c, d = sign.character(place)
        ink = _ink(character, round(c - a), round(d - b))[:, :, None]
        rows, cols = slice(round(b), round(b) + ink.shape[0]), slice(round(a), round(a) + ink.shape[1])
        canvas[rows, cols] += ink * (dark - canvas[rows, cols])


def _sign(rng: np.random.Generator, size: int) -> Sign:
    text = "".join(rng.choice(list(ALPHABET), int(rng.choice(LENGTHS))))
    scale = float(rng.uniform(*SCALE))
    blank = Sign(text, 0, 0, scale, float(rng.uniform(max(14.2, 6.3 * scale), 7.2 * scale + 1)))
    x, y = (float(rng.uniform(half + 2, size - half - 2)) for half in blank.half)
    return Sign(text, x, y, scale, blank.pitch)


def _apart(plate: tuple[float, float, float, float], disc: tuple[float, float, float]) -> bool:
    left, top, right, bottom = plate
    x, y, radius = disc
    return bool(np.hypot(max(left - x, 0, x - right), max(top - y, 0, y - bottom)) >= 1.1 * radius + _CLEAR)


def _beside(one: Sign, other: Sign) -> bool:
    gaps = (
        abs(one.x - other.x) - one.half[0] - other.half[0],
        abs(one.y - other.y) - one.half[1] - other.half[1],
    )
    return max(gaps) >= _CLEAR


def _ink(character: str, width: int, height: int) -> np.ndarray:
    """The character at that size, float32 [height, width] in 0..1."""
    return np.asarray(_glyph(character).resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255


@cache
def _glyph(character: str) -> Image.Image:
    load: Any = getattr(ImageFont, "load_default_imagefont", ImageFont.load_default)  # before Pillow 10.1
    cell = Image.new("L", (_CELL[0], 2 + _CELL[1]))
    ImageDraw.Draw(cell).text((0, 0), character, fill=255, font=load())
    return cell.crop((0, 2, _CELL[0], 2 + _CELL[1]))
