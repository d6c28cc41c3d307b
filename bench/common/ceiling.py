"""What the machine gives at most, through the same engine: the rate of matrix products, and of memory.

Both are measured on graphs of one kind of node, written here, opened like a bundle's. A product's rate is
the best of a few shapes that occur in transformers. Memory's is the best of two ways to read: one row times
large matrices, as decoding does it, and a plain sum.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vtp.bench.common.plain_graph import write_graph
from vtp.engines import Engine, Value, open_graph

# Rows, inner size, columns.
PRODUCTS = ((576, 1024, 4096), (576, 4096, 1024), (1024, 2048, 2048))
MATRICES, WIDTH = 4, 4096  # 268 MB of float32: more than a cache holds
_SUMMED = (64, 1 << 20)


@dataclass
class Ceiling:
    """One graph that is timed: `work` is its operations or the bytes that it reads."""

    kind: str  # "gemm" or "memory"
    name: str
    work: int
    engine: Engine
    feeds: dict[str, Value]

    def run(self) -> float:
        """Seconds of one run."""
        start = time.perf_counter()
        self.engine.run(self.feeds)
        return time.perf_counter() - start


def open_ceilings(
    folder: Path, engine: str, threads: int | None, dtype: str = "float32", small: bool = False
) -> list[Ceiling]:
    """Write and open the graphs in `folder`; `small` makes them tiny, for tests."""
    scale = 16 if small else 1
    made = []
    for rows, inner, columns in PRODUCTS:
        sizes = rows // scale, inner // scale, columns // scale
        path = _matmuls(folder / f"gemm_{inner}.onnx", [sizes[1:]], dtype)
        work = 2 * sizes[0] * sizes[1] * sizes[2]
        made.append(_opened("gemm", "x".join(map(str, sizes)), work, path, engine, threads, sizes[:2], dtype))
    width = WIDTH // scale
    path = _matmuls(folder / "rows.onnx", [(width, width)] * MATRICES, dtype)
    size = np.dtype(dtype).itemsize
    work = MATRICES * width * width * size
    made.append(_opened("memory", "row x matrices", work, path, engine, threads, (1, width), dtype))
    shape = _SUMMED[0] // scale, _SUMMED[1] // scale
    path = _sum(folder / "sum.onnx", dtype)
    work = shape[0] * shape[1] * size
    made.append(_opened("memory", "sum", work, path, engine, threads, shape, dtype))
    return made


def _opened(
    kind: str,
    name: str,
    work: int,
    path: Path,
    engine: str,
    threads: int | None,
    shape: Sequence[int],
    dtype: str,
) -> Ceiling:
    opened = open_graph(path, engine, threads)
    value = opened.put(np.full(shape, 0.01, dtype))
    return Ceiling(kind, name, work, opened, {"x": value})


def _matmuls(path: Path, shapes: Sequence[tuple[int, int]], dtype: str) -> Path:
    """x times one constant matrix after another."""
    random = np.random.default_rng(0)
    weights = {
        f"w{number}": (random.random(shape, np.float32) - 0.5).astype(dtype)
        for number, shape in enumerate(shapes)
    }
    values = ["x", *(f"x{number}" for number in range(1, len(shapes))), "y"]
    nodes = [("MatMul", [values[number], name], [values[number + 1]]) for number, name in enumerate(weights)]
    return write_graph(path, nodes, weights, dtype, ("rows", "inner", "columns"))


def _sum(path: Path, dtype: str) -> Path:
    """The sum of each row of x."""
    axes = {"axes": np.array([1])}
    return write_graph(path, [("ReduceSum", ["x", "axes"], ["y"])], axes, dtype, ("rows", "inner", "columns"))
