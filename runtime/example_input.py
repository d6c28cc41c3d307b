"""A picture or a clip, and a prompt, to check a bundle with, where its user gives none."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops

from vtp.runtime.preprocess import ImageSpec

PROMPT = "What is in the picture?"


def sample_for(spec: ImageSpec) -> Image.Image | list[Image.Image]:
    """What a bundle looks at: `sample_picture` at its size, or a clip through which that picture moves."""
    picture = sample_picture(spec.image_size or spec.fixed_size)
    if spec.frames is None:
        return picture
    moves = [picture.width * place // spec.frames for place in range(spec.frames)]
    return [ImageChops.offset(picture, move, 0) for move in moves]


def sample_picture(size: tuple[int, int]) -> Image.Image:
    """A picture that no two patches of are alike: smooth colour, noise and some edges; always the same."""
    height, width = size
    rng = np.random.default_rng(20260501)
    y, x = np.mgrid[0:height, 0:width] / max(size)
    waves = np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y - 2 * x), np.sin(9 * x * y + 1)], axis=-1)
    picture = 128 + 80 * waves + rng.normal(0, 18, (height, width, 3))
    for _ in range(8):
        top, left = rng.integers(0, height - height // 6), rng.integers(0, width - width // 6)
        picture[top : top + height // 6, left : left + width // 6] = rng.integers(0, 256, 3)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))
