"""Cues about the prompt's text for the pruners' tests; see `lattice` and `continuous` in compared.py.

R, the number of text tokens, changes with the seed: it is an axis that graphs leave free.
"""

from __future__ import annotations

import numpy as np

HEADS = 6  # of which sparsevlm hears two

# Axes that are free in the exported graphs beside the batch: R.
FREE = {
    "text_embeds": {1: "text"},
    "text_mask": {1: "text"},
    "text_attention": {2: "text"},
    "text_gravity": {1: "text"},
}


def lattice(count: int, width: int, dtype: str, batch: int, seed: int, levels: int) -> dict[str, np.ndarray]:
    """Cues whose sums and quotients are exact in float32, full of ties; gravity of any sign, or 0."""
    rng = np.random.default_rng((seed, 1))
    texts = 2 + seed % 4
    embeds = np.zeros((batch, texts, width))
    for row in embeds.reshape(-1, width):
        row[rng.choice(width, 2, replace=False)] = rng.choice([-1, 1], 2)
    attention = rng.integers(0, levels, (batch, HEADS, texts, count)) / 16
    gravity = rng.choice([-1, 0, 0.5, 1, 1, 2], (batch, texts, count))
    scores = rng.integers(0, levels, (batch, count)) / 16
    return typed(dtype, embeds, mask(rng, batch, texts), attention, gravity, scores)


def continuous(count: int, width: int, dtype: str, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Cues without structure."""
    rng = np.random.default_rng((seed, 2))
    texts = 2 + seed % 4
    embeds = rng.standard_normal((batch, texts, width))
    attention = rng.random((batch, HEADS, texts, count)) ** 3
    gravity = rng.uniform(0.3, 1.5, (batch, texts, count)) * rng.choice([-1, 1, 1, 1], (batch, texts, count))
    scores = rng.random((batch, count)) ** 3
    return typed(dtype, embeds, mask(rng, batch, texts), attention, gravity, scores)


def mask(rng: np.random.Generator, batch: int, texts: int) -> np.ndarray:
    """Zeros for the text in front of the picture, then ones: none, some or all of it."""
    return np.arange(texts) >= rng.integers(0, texts + 1, (batch, 1))


def typed(
    dtype: str,
    embeds: np.ndarray,
    mask: np.ndarray,
    attention: np.ndarray,
    gravity: np.ndarray,
    scores: np.ndarray,
) -> dict[str, np.ndarray]:
    """Every cue by name: embeddings in the model's dtype, the rest float32."""
    numbers = {
        "text_mask": mask,
        "text_attention": attention,
        "text_gravity": gravity,
        "next_scores": scores,
    }
    return {
        "text_embeds": embeds.astype(dtype),
        **{name: value.astype(np.float32) for name, value in numbers.items()},
    }
