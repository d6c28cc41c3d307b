"""The greedy kernel's own source, compiled for the CPU with the system's C++ compiler."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from vtp.engines.plugins.greedy import SOURCE

HERE = Path(__file__).parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: install g++")


@functools.cache
def kernel() -> ctypes.CDLL:
    """The compiled kernel, once for the process."""
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "greedy.so"
        flags = [
            "-O2",
            "-std=c++17",
            "-shared",
            "-fPIC",
            f"-I{SOURCE.parent}",
            f"-I{HERE}",
        ]
        source = HERE / "greedy_host.cpp"
        subprocess.run([COMPILER, *flags, "-o", str(library), str(source)], check=True)
        return ctypes.CDLL(str(library))


def pick(scores: np.ndarray, factors: np.ndarray, keep: int, shuffle: int = 0) -> np.ndarray:
    """What the kernel picks, int64 [B,keep], from scores float32 [B,N] and factors float32 [B,N,N].

    Its threads run in their order, backwards (shuffle 1), or in one of many shuffled orders (2 and up).
    """
    scores, factors = (np.ascontiguousarray(one, np.float32) for one in (scores, factors))
    batch, count = scores.shape
    assert factors.shape == (batch, count, count)
    picks = np.full((batch + 1, keep), -7, np.int64)  # the last line must stay as it is
    addresses = [ctypes.c_void_p(one.ctypes.data) for one in (scores, factors, picks)]
    beyond = kernel().run(*addresses[:2], batch, count, keep, shuffle, addresses[2])
    assert not beyond, "the kernel wrote past its shared memory"
    assert (picks[-1] == -7).all(), "the kernel wrote past its output"
    return picks[:-1]


def by_numpy(scores: np.ndarray, factors: np.ndarray, keep: int) -> np.ndarray:
    """The same selection in plain numpy, one picture after another; the lowest index of equal scores."""
    picks = []
    for score, table in zip(scores, factors, strict=True):
        left, mine = score.copy(), []
        for _ in range(keep):
            mine.append(int(np.argmax(left)))
            left = left * table[mine[-1]]
            left[mine] = -np.inf
        picks.append(mine)
    return np.array(picks, np.int64)
