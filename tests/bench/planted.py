"""A run of `make bench` with planted times, and what reads its tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.common.pairs import TURNS, pair_of
from vtp.bench.compare import peers, peers_report
from vtp.runtime.commands.console import Progress


def figures(median: float) -> dict[str, Any]:
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median, "runs": 10}


def turns(theirs: str, ours: str, ttft: tuple[float, float], tpot: tuple[float, float]) -> dict[str, Any]:
    """A pair of planted times: around the given milliseconds, the machine's slow moments in both."""
    slow = np.linspace(0.9, 1.1, TURNS)
    noise = np.random.default_rng(0).permutation(np.linspace(0.98, 1.02, TURNS))
    return pair_of(
        theirs,
        ours,
        {
            theirs: {"ttft": (ttft[0] * slow * noise).tolist(), "tpot": (tpot[0] * slow * noise).tolist()},
            ours: {"ttft": (ttft[1] * slow).tolist(), "tpot": (tpot[1] * slow).tolist()},
        },
    )


RESULTS: dict[str, Any] = {
    "format": peers_report.FORMAT,
    "model": "llava-ov-0.5b",
    "keep": 64,
    "rounds": TURNS,
    "tokens": 16,
    "threads": 2,
    "decoder_tokens": 80,
    "machine": {
        "processor": "a processor",
        "cores": 2,
        "memory_gb": 24.0,
        "system": "a system",
        "python": "3.11",
        "versions": {"onnxruntime": "1.31"},
        "time": "2026-11-21 12:00 UTC",
    },
    "peers": {
        "torch": {"peak": 4 * 10**9},
        "transformers-onnx": {
            "peak": 4 * 10**9,
            "equal": {"to": "torch", "tokens": 16, "of": 16, "difference": 2e-6, "close": True},
        },
        "vtp vispruner": {"peak": 3 * 10**9},
        "vtp none": {"peak": 3 * 10**9, "parts": {"encoder": [900.0, 910.0, 950.0]}},
        "vtp adaptprune": {"peak": 3 * 10**9},
        "vtp vispruner int8 int4": {"peak": 10**9, "parts": {"encoder": [700.0], "prompt": [260.0]}},
        "vtp none int8 int4": {"peak": 10**9},
        "openvino-int4": {
            "peak": 10**9,
            "equal": {"to": "torch", "tokens": 3, "of": 16, "difference": 0.2, "cosine": 0.98, "close": True},
        },
        "llamacpp-q4_0": {"peak": 10**9, "parts": {"encoder": [2500.0], "prompt": [1900.0]}},
        "genai": {"peak": 2 * 10**9},
        "vtp decoder": {"peak": 2 * 10**9},
    },
    # The machine was slower while torch ran, and slower still beside adaptprune.
    "pairs": [
        turns("torch", "vtp vispruner", (6000, 1200), (66, 60)),
        turns("transformers-onnx", "vtp vispruner", (1700, 1000), (33, 30)),
        turns("vtp none", "vtp vispruner", (1800, 1000), (33, 30)),
        turns("transformers-onnx", "vtp adaptprune", (3400, 1900), (66, 60)),
        turns("llamacpp-q4_0", "vtp vispruner int8 int4", (4400, 1000), (18, 17)),
        turns("openvino-int4", "vtp vispruner int8 int4", (2200, 1000), (18, 17)),
        turns("vtp none int8 int4", "vtp vispruner int8 int4", (2900, 1000), (18, 17)),
        turns("genai", "vtp decoder", (170, 170), (66, 60)),
    ],
    "llamacpp": {
        "version": "0.5.0-dev",
        "compiler": "GNU 12.2.0",
        "package": "0.3.36",
        "options": {"GGML_NATIVE": "ON"},
        "instructions": ["AVX2", "AVX512"],
    },
    "missing": {"openvino": "pip install 'vtp-edge[peers]'", "llamacpp": "make llamacpp"},
    "failed": {"torch-vispruner": "its process was killed by signal 9 (out of memory?)"},
    "stages": {},
}


def lines_of(text: str) -> list[list[str]]:
    """The rows of every Markdown table, cell by cell."""
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def number(cell: str) -> float:
    return float(cell.split()[0])


def contest(tmp_path: Path, **changes: Any) -> peers.Contest:
    flags = {"model": str(tmp_path), "shape": "x", "also": [], "peers": "all", "keep": "3", "rounds": "2"}
    flags |= {"int8": False, "int4": False, "towers": None, "tokens": "5", "threads": "1"}
    flags |= {"work": str(tmp_path), **changes}
    return peers.Contest(argparse.Namespace(**flags), Progress())
