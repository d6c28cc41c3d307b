"""What a pruner's graph costs: milliseconds on ONNX Runtime, nodes and bytes, on random cues.

    python -m vtp.bench.studies.pruner_cost focal vispruner [--grid 24x24] [--keep 64] [--width 1024]

Batch 1, one thread, the least of several runs taken in turn, so that a slow moment of the machine meets
every method. Text is 60 tokens and attention has 16 heads, where a method reads them.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from vtp.engines import UsageError
from vtp.engines.ort.library import load_onnxruntime
from vtp.export.cli import quiet_libraries
from vtp.export.pruners import find_method, ops
from vtp.export.pruners.base import Pruner
from vtp.export.tower_cues import SCORES
from vtp.runtime.commands.arguments import add_debug, whole
from vtp.runtime.commands.console import Parser, run_command
from vtp.runtime.commands.tables import markdown_table

TEXT, HEADS = 60, 16


class _Positional(nn.Module):
    """A pruner whose cues come in the order of its `needs`."""

    def __init__(self, pruner: Pruner) -> None:
        super().__init__()
        self.pruner = pruner

    def forward(self, *cues: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.pruner(**dict(zip(self.pruner.needs, cues, strict=True)))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(
        prog="python -m vtp.bench.studies.pruner_cost", description="What a pruner's graph costs."
    )
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--grid", default="24x24", help="rows x columns (default: %(default)s)")
    parser.add_argument("--keep", type=whole, default=64, help="default: %(default)s")
    parser.add_argument("--width", type=whole, default=1024, help="of a feature (default: %(default)s)")
    parser.add_argument("--runs", type=whole, default=9, help="default: %(default)s")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("pruner_cost", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    """Export each method's pruner alone; least time of all runs, nodes and size of the graph."""
    quiet_libraries()
    grid = parse_grid(args.grid)
    count = grid[0] * grid[1]
    cues = random_cues(count, args.width)
    sizes: dict[str, list[str]] = {}
    sessions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.methods:
            pruner = find_method(name)(grid, args.keep).eval()
            path = Path(folder) / f"{name}.onnx"
            emit_pruner(pruner, cues, path)
            size = sum(file.stat().st_size for file in Path(folder).glob(f"{name}.onnx*"))
            sizes[name] = [str(len(onnx.load(path).graph.node)), f"{size / 1024:.0f}"]
            sessions[name] = _session(path)
    least = dict.fromkeys(sessions, np.inf)
    for _ in range(args.runs):
        for name, session in sessions.items():
            given = {item.name: cues[item.name].numpy() for item in session.get_inputs()}
            started = time.perf_counter()
            session.run(None, given)
            least[name] = min(least[name], (time.perf_counter() - started) * 1e3)
    rows = [[name, f"{least[name]:.1f}", *sizes[name]] for name in sessions]
    print(markdown_table(["method", "ms", "nodes", "KiB"], rows, 1, tight=True))
    print(f"\nN = {count}, K = {args.keep}, width {args.width}; least of {args.runs} runs, one thread")


def parse_grid(text: str) -> tuple[int, int]:
    """(rows, columns) from "24x24". Raises UsageError."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdecimal() and int(side) for side in sides):
        raise UsageError(f"grid '{text}' is not of the form ROWSxCOLUMNS, for example 24x24")
    return int(sides[0]), int(sides[1])


def random_cues(count: int, width: int) -> dict[str, Tensor]:
    """Every cue of a pruner that `count` tokens reach, batch 1.

    Rows have a common direction, as real ones do, and attention sums to 1.
    """
    generator = torch.Generator().manual_seed(0)
    side = 14 * math.isqrt(count)  # pixels

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    rows = ("image_features", "vision_keys", "image_embeds", "hidden_states", "keys")
    return {
        **{name: normal(count, width) + normal(1, width) for name in rows},
        **{name: normal(3, side, side) for name in ("picture", "reference_picture")},
        **{name: normal(count).softmax(dim=1) for name in SCORES},
        "next_scores": normal(count).softmax(dim=1),
        "text_embeds": normal(TEXT, width),
        "text_mask": torch.ones(1, TEXT),
        "text_attention": normal(HEADS, TEXT, count).softmax(dim=3),
        "text_gravity": 1 + normal(TEXT, count).abs(),
    }


def emit_pruner(pruner: Pruner, cues: Mapping[str, Tensor], path: Path) -> None:
    """Write the graph of a pruner alone, for batch 1."""
    unknown = sorted(set(pruner.needs) - set(cues))
    if unknown:
        raise UsageError(f"method {pruner.name} needs {unknown[0]}; this command has {', '.join(cues)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Positional(pruner).eval(),
            tuple(cues[name] for name in pruner.needs),
            dynamo=True,
            opset_version=23,
            input_names=list(pruner.needs),
            output_names=["keep_indices", "rows"][: 1 + pruner.merges],
            custom_translation_table=ops.onnx_translations(),
            verbose=False,
        )
    assert program is not None
    program.save(path)


def _session(path: Path) -> Any:
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


if __name__ == "__main__":
    sys.exit(main())
