"""Bilinear resizing with antialiasing as torch does it to uint8: 16-bit weights, rounded between two passes.

Source: `upsample_bilinear2d_aa` of PyTorch's UpSampleKernelAVXAntialias.h, which torchvision's `resize` uses
on processors with AVX2. Pillow's own is the same with finer weights; a pixel may differ by one.
"""

from __future__ import annotations

import math

import numpy as np

_ROWS = 256  # resized at a time, so that sums of 32 bits stay small beside the picture


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H,W,3] -> uint8 [h,w,3] of `size`, along the width first; an edge that fits is left alone."""
    for axis in (1, 0):
        if pixels.shape[axis] != size[axis]:
            pixels = _along(pixels, axis, size[axis])
    return pixels


def _along(pixels: np.ndarray, axis: int, length: int) -> np.ndarray:
    first, weights, precision = _weights(pixels.shape[axis], length)
    if axis == 0:
        return _summed(pixels, first, weights, precision)
    strips = range(0, len(pixels), _ROWS)
    turned = [pixels[top : top + _ROWS].transpose(1, 0, 2) for top in strips]
    return np.concatenate([_summed(one, first, weights, precision).transpose(1, 0, 2) for one in turned])


def _summed(pixels: np.ndarray, first: np.ndarray, weights: np.ndarray, precision: int) -> np.ndarray:
    """Rows of the result from rows of pixels [n,W,3]: tap j of row i is row first[i] + j."""
    total = np.full((len(first), *pixels.shape[1:]), 1 << (precision - 1), np.int32)
    for tap in range(weights.shape[1]):
        rows = pixels[np.minimum(first + tap, len(pixels) - 1)]  # past the end, weights are 0
        total += rows * weights[:, tap, None, None]
    return np.clip(total >> precision, 0, 255).astype(np.uint8)


def _weights(source: int, length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Of every place of the result: its first source pixel, int32 weights [length,taps], their bits."""
    scale = source / length
    support, step = max(scale, 1.0), 1.0 / max(scale, 1.0)
    taps = math.ceil(support) * 2 + 1
    first, rows = np.zeros(length, np.int64), np.zeros((length, taps))
    for place in range(length):
        centre = scale * (place + 0.5)
        low = max(int(centre - support + 0.5), 0)
        count = min(max(min(int(centre + support + 0.5), source) - low, 0), taps)
        row = [max(0.0, 1.0 - abs((tap + low - centre + 0.5) * step)) for tap in range(count)]
        first[place] = low
        rows[place, :count] = np.array(row) / sum(row)
    largest = rows.max()
    precision = next(
        bits for bits in range(23) if bits == 22 or int(0.5 + largest * (1 << (bits + 1))) >= 1 << 15
    )
    return first, np.floor(0.5 + rows * (1 << precision)).astype(np.int32), precision
