"""How far a tensor is from the one it should be: one comparator and one table of limits for every check.

Values are compared row by row (the last axis, a token's channels), relative to the row. Some channels of real
models are massive, a thousand times the others (arXiv 2402.17762): measured against them, everything else in
the row could be wrong unseen. Each value is therefore divided by the row's scale, or by itself where it is
larger. The scale is the root mean square of the row without its largest eighth. A massive channel then counts
as much as any other and no more, and the magnitude of a tensor does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

MASSIVE = 8  # one in 8 channels of a row, the largest ones, is left out of the row's scale
ROUNDING = 2.0**-22  # four float32 roundings of a row's largest value: no sum with it is more exact
_CHUNK = 1 << 21  # values that are compared at a time, in float64


@dataclass(frozen=True)
class Limits:
    """What is allowed in every row.

    relative  most, of the length of the row's difference as a share of the row's length
    element   most, of a single value's difference as a share of the row's scale or of the value
    cosine    least, of the angle between the two rows
    zero      a row's scale is at least this: smaller values have no digits worth comparing
    """

    relative: float
    element: float
    cosine: float
    zero: float


LIMITS = {
    "float32": Limits(relative=1e-3, element=5e-3, cosine=0.99999, zero=1e-6),
    # Rounding between the nodes alone: 36 layers were seen 5e-3 apart, single values 2e-2.
    "float16": Limits(relative=2e-2, element=1e-1, cosine=0.9995, zero=6.1e-5),
    # A float16 graph in other kernels, such as TensorRT's: their sums are float16 as well.
    "float16 kernels": Limits(relative=4e-2, element=2.5e-1, cosine=0.999, zero=6.1e-5),
    # Activations are rounded to int8 in every product: an order of sums decides codes of what follows.
    "int4": Limits(relative=6e-2, element=3e-1, cosine=0.998, zero=1e-6),
}


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`.

    ok         every row is within the limits, and there was at least one
    worst_row  the row nearest to its limits or farthest beyond them, counted over all axes but the last;
               None where no row was compared
    relative   the largest of all rows; infinite where a value is not finite
    element    the largest of all values
    cosine     the least of all rows
    rows       how many were compared
    why        what is wrong, in words; empty where nothing is
    """

    ok: bool
    worst_row: int | None
    relative: float
    element: float
    cosine: float
    rows: int
    why: str

    def to_report(self) -> dict[str, Any]:
        """What a manifest keeps."""
        return {"rows": self.rows, "relative": self.relative, "element": self.element, "cosine": self.cosine}


def compare(got: Any, want: Any, dtype: str) -> Comparison:
    """Hold `got` against `want`, arrays of one shape [..., channels], by the limits of `dtype`.

    Whole numbers and truth values must be equal. Arrays without values do not pass: nothing was compared.
    Raises ValueError for a dtype without limits.
    """
    limits = limits_of(dtype)
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return _failed(f"shape {list(got.shape)} instead of {list(want.shape)}")
    if want.size == 0:
        return _failed("nothing to compare")
    if want.ndim == 0:
        got, want = got[None], want[None]
    if want.dtype.kind != "f" or got.dtype.kind != "f":
        return _compare_exact(got, want)
    measured = [_measure(one, two, limits) for one, two in _chunks(got, want)]
    relative, element, cosine = (np.concatenate(column) for column in zip(*measured, strict=True))
    return _judge(relative, element, cosine, limits)


def limits_of(dtype: str) -> Limits:
    """The row of the table. Raises ValueError for a dtype that is not in it."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in LIMITS:
        raise ValueError(f"no limits for '{name}'; choose one of {', '.join(LIMITS)}")
    return LIMITS[name]


def row_scale(want: np.ndarray, limits: Limits) -> np.ndarray:
    """The scale of every row of want [rows, channels]: float64 [rows, 1]."""
    size = np.abs(want)
    count = size.shape[-1]
    ordinary = max(1, count - -(-count // MASSIVE))
    usual = np.partition(size, ordinary - 1, axis=-1)[:, :ordinary]
    scale = np.sqrt(np.square(usual).mean(axis=-1, keepdims=True))
    noise = size.max(axis=-1, keepdims=True) * (ROUNDING / limits.relative)
    return np.maximum(np.maximum(scale, noise), limits.zero)


def _measure(got: np.ndarray, want: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """relative, element and cosine of every row of [rows, channels]."""
    unusable = ~(np.isfinite(got).all(axis=-1) & np.isfinite(want).all(axis=-1))
    got, want = (np.where(unusable[:, None], 0.0, array) for array in (got, want))
    unit = np.maximum(row_scale(want, limits), np.abs(want))
    one, two = got / unit, want / unit  # no value of `two` exceeds one
    gap, length = np.abs(one - two), np.linalg.norm(two, axis=-1)
    relative = np.linalg.norm(gap, axis=-1) / np.maximum(length, 1.0)
    relative[unusable], element = np.inf, np.where(unusable, np.inf, gap.max(axis=-1))
    return relative, element, np.where(unusable, -1.0, _cosine(one, two, length))


def _cosine(one: np.ndarray, two: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Cosine of every pair of rows; 1 where the wanted row is too short to have a direction."""
    both = np.linalg.norm(one, axis=-1) * length
    dot = np.einsum("rc,rc->r", one, two)
    cosine = np.divide(dot, both, out=np.zeros_like(dot), where=both > 0)
    return np.where(np.abs(two).max(axis=-1) < 0.5, 1.0, np.clip(cosine, -1.0, 1.0))


def _judge(relative: np.ndarray, element: np.ndarray, cosine: np.ndarray, limits: Limits) -> Comparison:
    shares = (
        relative / limits.relative,
        element / limits.element,
        (1.0 - cosine) / (1.0 - limits.cosine),
    )
    share = np.maximum.reduce(shares)
    row = int(share.argmax())
    ok = bool(share[row] <= 1.0)
    kind = int(np.argmax([one[row] for one in shares]))
    return Comparison(
        ok,
        row,
        float(relative.max()),
        float(element.max()),
        float(cosine.min()),
        len(relative),
        ""
        if ok
        else _why(row, kind, (float(relative[row]), float(element[row]), float(cosine[row])), limits),
    )


def _why(row: int, kind: int, found: tuple[float, float, float], limits: Limits) -> str:
    if np.isinf(found[0]):
        return f"row {row} has values that are not finite"
    what = (
        f"by {found[0]:.2g} of its length (allowed {limits.relative:g})",
        f"by {found[1]:.2g} in one channel (allowed {limits.element:g})",
        f"in direction, cosine {found[2]:.5f} (at least {limits.cosine:g})",
    )
    return f"row {row} differs {what[kind]}"


def _failed(why: str) -> Comparison:
    return Comparison(False, None, float("inf"), float("inf"), -1.0, 0, why)


def _compare_exact(got: np.ndarray, want: np.ndarray) -> Comparison:
    equal = (got == want).reshape(-1, want.shape[-1]).all(axis=-1)
    if equal.all():
        return Comparison(True, 0, 0.0, 0.0, 1.0, len(equal), "")
    row = int(equal.argmin())
    worst = float("inf")
    return Comparison(False, row, worst, worst, -1.0, len(equal), f"row {row} has other numbers")


def _chunks(got: np.ndarray, want: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows [rows, channels] of both in float64, a bounded number at a time."""
    width = want.shape[-1]
    got, want = got.reshape(-1, width), want.reshape(-1, width)
    step = max(1, _CHUNK // width)
    for start in range(0, len(want), step):
        rows = slice(start, start + step)
        yield got[rows].astype(np.float64), want[rows].astype(np.float64)
