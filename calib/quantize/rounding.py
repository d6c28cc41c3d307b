"""Numbers in fewer bits: ranges of activations, int8 weights per channel, int4 weights in blocks.

Everything is symmetric: zero stays zero, and TensorRT takes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

INT8, INT4 = 127, 7  # largest code; int4 has -8 as well
_BINS = 2048
_LEAST = 2.0**-100  # of a histogram's upper end, far above what float32 divides by
_CLIPS = np.geomspace(0.05, 1.0, 60)  # of the largest value seen, tried as limits of a range
_FACTORS = np.geomspace(5.5, 14, 16)  # of a block's largest weight that a step may be, as a divisor
_CHUNK = 1 << 22  # weights searched at once: bounds the memory of the search

Rounding = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # float blocks -> (codes, scales)


class Range:
    """How large one tensor's values are, from a histogram of their magnitudes that grows with them.

    The histogram's upper end is a power of two, so that parts merge without a rounding: any order of values,
    in any parts, gives the same histogram.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)
        self.limit = 0.0  # upper end of the last bin
        self.top = 0.0  # largest magnitude seen

    def add(self, values: np.ndarray) -> None:
        """Count more values, of any shape."""
        magnitudes = np.abs(values.astype(np.float32, copy=False)).ravel()
        top = float(magnitudes.max(initial=0))
        if top and top >= self.limit:
            self._grow(top)
        self.top = max(self.top, top)
        bins = (magnitudes * (_BINS / self.limit if self.limit else 0)).astype(np.int64)
        self.counts += np.bincount(bins, minlength=_BINS)

    def merge(self, other: Range) -> None:
        """Count what another counted as well."""
        counts, limit = other.counts, other.limit
        if limit > self.limit:
            self._grow(limit / 2)
        while 0 < limit < self.limit:
            counts, limit = _halved(counts), limit * 2
        self.counts += counts
        self.top = max(self.top, other.top)

    def scale(self, codes: int = INT8) -> float:
        """Step of `codes` symmetric codes with the least expected squared error; 1 where all values were 0.

        A smaller range clips the largest values and resolves the others better; 60 ranges are tried.
        """
        if not self.top:
            return 1.0
        middles = (np.arange(_BINS) + 0.5) * self.limit / _BINS
        errors = [self._error(middles, clip * self.top, codes) for clip in _CLIPS]
        return float(_CLIPS[int(np.argmin(errors))] * self.top / codes)

    def _error(self, middles: np.ndarray, limit: float, codes: int) -> float:
        step = limit / codes
        inside = np.where(middles < step / 2, middles * middles, step * step / 12)  # the smallest become 0
        error = np.where(middles <= limit, inside, (middles - limit) ** 2)
        return float((error * self.counts).sum())

    def _grow(self, top: float) -> None:
        """Double the limit until it is above `top`, joining pairs of bins."""
        if not self.limit:
            self.limit = max(_LEAST, 2.0 ** math.frexp(top)[1])
        while self.limit <= top:
            self.limit *= 2
            self.counts = _halved(self.counts)


def _halved(counts: np.ndarray) -> np.ndarray:
    """A histogram with pairs of bins joined, as one with twice the upper end."""
    return np.concatenate([counts.reshape(-1, 2).sum(1), np.zeros(_BINS // 2, np.int64)])


@dataclass(frozen=True)
class Blocks:
    """int4 weights: codes uint8 [N, blocks, block] (8 stands for zero) and scales [N, blocks]."""

    codes: np.ndarray
    scales: np.ndarray

    def weight(self, rows: int) -> np.ndarray:
        """The weight [K,N] that these codes stand for, of which `rows` are real."""
        values = (self.codes.astype(np.float32) - 8) * self.scales.astype(np.float32)[..., None]
        return values.reshape(len(values), -1)[:, :rows].T

    def packed(self) -> np.ndarray:
        """uint8 [N, blocks, block/2], the first of a pair in the low half: MatMulNBits' form."""
        return self.codes[..., 0::2] | (self.codes[..., 1::2] << 4)

    def packed_tensor(self) -> np.ndarray:
        """The bytes of an ONNX int4 tensor [K,N]: codes in two's complement, two in a byte."""
        signed = (self.codes.reshape(len(self.codes), -1) ^ 8) & 15  # 0..15 around 8, to -8..7
        flat = signed.T.ravel()
        return flat[0::2] | (flat[1::2] << 4)


def int8_channels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes [K,N] of a weight [K,N] and a scale float32 [N] for each output channel."""
    scale = np.abs(weight).max(axis=0).astype(np.float32) / INT8
    scale[scale == 0] = 1
    return np.clip(np.rint(weight / scale), -INT8, INT8).astype(np.int8), scale


def int4_blocks(weight: np.ndarray, importance: np.ndarray, block: int, dtype: str, positive: bool) -> Blocks:
    """Codes of a weight [K,N] in blocks of `block` along K.

    importance  mean squares [K] of what the weight is multiplied with: errors count by it
    dtype       of the scales, as the graph stores them
    positive    scales above zero only, as TensorRT wants; else a block may use its extra code for its
                largest weight, whatever that one's sign

    Every block tries 16 scales (32 with signs), then takes the least-squares one for the codes found. K is
    padded with zeros to whole blocks.
    """
    rows, count = len(weight), -(-len(weight) // block)
    counts = np.zeros((count, block), np.float32)
    counts.reshape(-1)[:rows] = importance / max(float(importance.mean()), 1e-30) + 1e-4
    return _in_blocks(weight, block, dtype, lambda part: _search(part, counts, dtype, positive))


def nearest_blocks(weight: np.ndarray, block: int, dtype: str) -> Blocks:
    """Codes of a weight [K,N] as ONNX Runtime's own quantiser gives them (symmetric, no search): the largest
    weight of a block, whatever its sign, gets code -8, and all are rounded to the nearest, halves up.
    """
    return _in_blocks(weight, block, dtype, _nearest)


def _nearest(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of columns in blocks [columns,blocks,block]."""
    place = np.abs(part).argmax(axis=-1)[..., None]
    scale = np.take_along_axis(part, place, axis=-1)[..., 0] / np.float32(-8)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    return np.clip(np.floor(part * inverse[..., None] + 8.5), 0, 15), scale


def _in_blocks(weight: np.ndarray, block: int, dtype: str, rounded: Rounding) -> Blocks:
    """Blocks of a weight [K,N], some columns at a time: K is padded with zeros to whole blocks."""
    rows, columns = weight.shape
    count = -(-rows // block)
    codes = np.empty((columns, count, block), np.uint8)
    scales = np.empty((columns, count), dtype)
    step = max(1, _CHUNK // (count * block))
    for start in range(0, columns, step):
        part = np.zeros((min(step, columns - start), count * block), np.float32)
        part[:, :rows] = weight[:, start : start + step].T
        found = rounded(part.reshape(len(part), count, block))
        codes[start : start + step], scales[start : start + step] = found
    return Blocks(codes, scales)


def _search(
    blocks: np.ndarray, importance: np.ndarray, dtype: str, positive: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of blocks [n, blocks, block] with the least weighted squared error."""
    place = np.abs(blocks).argmax(axis=-1)[..., None]
    top = np.take_along_axis(blocks, place, axis=-1)[..., 0]
    bases = [np.abs(top)] if positive else [np.abs(top), -top]
    scales = np.zeros_like(top)
    least = np.full(top.shape, np.inf, np.float32)
    for base in bases:
        for factor in _FACTORS:
            tried = base / factor
            tried = _best_scale(blocks, importance, _codes(blocks, tried), tried).astype(dtype)
            error = _error(blocks, importance, tried)
            better = (error < least) & (~positive | (tried > 0))
            scales, least = np.where(better, tried, scales), np.where(better, error, least)
    scales = np.where(scales == 0, 1, scales).astype(dtype)
    return (_codes(blocks, scales) + 8).astype(np.uint8), scales


def _codes(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    steps = scales.astype(np.float32)[..., None]
    return np.clip(np.rint(blocks / np.where(steps == 0, 1, steps)), -INT4 - 1, INT4)


def _best_scale(
    blocks: np.ndarray, importance: np.ndarray, codes: np.ndarray, otherwise: np.ndarray
) -> np.ndarray:
    """The least-squares scales for fixed codes."""
    below = (importance * codes * codes).sum(-1)
    return np.where(
        below > 0, (importance * codes * blocks).sum(-1) / np.where(below > 0, below, 1), otherwise
    )


def _error(blocks: np.ndarray, importance: np.ndarray, scales: np.ndarray) -> np.ndarray:
    off = blocks - _codes(blocks, scales) * scales.astype(np.float32)[..., None]
    return (importance * off * off).sum(-1)


def decibels(signal: float, noise: float) -> float:
    """Signal-to-noise ratio in dB, at most 120."""
    if noise <= signal * 1e-12:
        return 120.0
    return float(10 * np.log10(max(signal, 1e-30) / noise))
